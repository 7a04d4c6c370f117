#!/usr/bin/env bash
# Cargo's runner (see .cargo/config.toml): starts a binary with LibTorch on its library path, wherever the binary lies.
set -euo pipefail
lib=${LIBTORCH_LIB:-${LIBTORCH:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.libtorch}}/lib
if [ ! -d "$lib" ]; then
  printf 'error: there is no LibTorch at %s\nhint: run scripts/setup_env.sh\n' "$lib" >&2
  exit 1
fi
LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$@"
