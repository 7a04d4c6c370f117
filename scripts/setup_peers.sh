#!/usr/bin/env bash
# Sets up the Python that some tests compare with, in ./.venv-peers; nothing else needs it. Prints its path; what it does
# goes to stderr.
#
# Usage: ATTN_TEST_PYTHON=$(scripts/setup_peers.sh [--all]) scripts/test.sh
#   Without --all what reads a run's files: pandas, pyarrow and TensorBoard (440 MB on disk). With it also torch,
#   transformers and PEFT (5 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
packages=(pandas==3.1.1 pyarrow==26.0.1 tensorboard==2.21.0)
case "${1:-}" in
  "") ;;
  --all) packages+=(torch==2.11.0 transformers==5.23.0 peft==0.21.2) ;;
  *) echo "error: \`$1\`, expected nothing or --all" >&2; exit 2 ;;
esac

# The last file written: a set-up that was broken off is done again.
ready=.venv-peers/ready
if [[ " $(cat "$ready" 2>/dev/null) " != *" ${packages[*]} "* ]]; then
  echo "peers: downloading ${packages[*]}" >&2
  python3 -m venv --clear .venv-peers >&2
  .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "${packages[@]}" >&2
  echo "${packages[*]}" > "$ready"
fi
echo "$PWD/.venv-peers/bin/python"
