#!/usr/bin/env bash
# Sets up what is missing and runs the main job: fine-tunes a model.
#
# Usage: scripts/run_experiment.sh [CONFIG] [OPTION...]
#   CONFIG and the options are those of `attn finetune`; `--help` lists them. Without any, it runs the default on the
#   data and the model of this repository, without a network. It runs in the root of the repository.
set -euo pipefail
# A config may be named from where the user stands.
if [ $# -gt 0 ] && [ -f "$1" ]; then
  config=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
  shift
  set -- "$config" "$@"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh
exec cargo run --package attn-cli -- finetune "$@"
