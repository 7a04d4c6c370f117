#!/usr/bin/env bash
# Times fine-tuning and generation against transformers on this machine, both sides in turns, and writes what it found.
#
# Usage: scripts/bench_finetune.sh --python PYTHON [--section train|distill|sst2|generate|start]... [--threads N] [--rounds N]
#                                  [--out DIR]
#   PYTHON  a Python with transformers, in an environment of its own that nothing else here needs (or set BENCH_PYTHON):
#             python3 -m venv /path/to/venv
#             /path/to/venv/bin/pip install torch==2.11.0 transformers==5.23.0 accelerate pyarrow
#   N       threads of each side (1), and turns that each takes (5)
#   DIR     where the figures go, one JSON file and one table a section (runs/bench-finetune)
#
# Sections: `train`, a step of GPT-2 124M against the matrix products alone; `distill`, a step of its distillation (only
# where asked for); `sst2`, a pass over SST-2 with DistilBERT;
# `generate`, greedy text of GPT-2 124M; `start`, from the start of the process to the first step. Models have random
# weights; their configs and tokenizers, and SST-2, come from the Hub or its cache (HF_HUB_CACHE, HF_HUB_OFFLINE).
# Our side is built in the dev profile, as every command of the README is; PROFILE=release builds the other one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${BENCH_PYTHON:-}" ] && [[ " $* " != *" --python"* ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
profile=${PROFILE:-dev}
scripts/setup_env.sh
cargo build --quiet --profile "$profile" --package attn-cli --bin attn
cargo build --quiet --profile "$profile" --package attn-train --example bench
folder=target/${profile/#dev/debug}
exec "${BENCH_PYTHON:-python3}" scripts/bench/run.py ${BENCH_PYTHON:+--python "$BENCH_PYTHON"} \
  --ours "$folder/examples/bench" --attn "$folder/attn" --out runs/bench-finetune "$@"
