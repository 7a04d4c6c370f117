#!/usr/bin/env bash
# Times scores and ablations of heads against the loops over transformers that users write, both sides in turns, and writes what it
# found.
#
# Usage: scripts/bench_heads.sh --python PYTHON [--section ablate|ablate_last|michel|layers|routed|retrieval]... [--threads N]
#                               [--rounds N] [--out DIR]
#   PYTHON  a Python with transformers (scripts/setup_peers.sh --all makes one and prints its path)
#   N       threads of each side (2), and turns that each takes (3)
#   DIR     where the figures go, a JSON file a section and one table (runs/bench-heads)
#
# GPT-2 124M, random weights. Sections: `ablate`, every head left out in turn with the loss of every token; `ablate_last`, with
# that of a row's last token alone; `michel`, the score by gradients of a classifier; `layers`, what the attention layers save with
# half of their heads removed; `routed`, what they save in BERT base where each of 16 texts of 256 tokens opens its own half;
# `retrieval`, retrieval scores of one needle in a Llama of 8 layers, 512 wide. Our side is built in the dev profile, as every command of the README is;
# PROFILE=release builds the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " != *" --python"* ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
profile=${PROFILE:-dev}
scripts/setup_env.sh
cargo build --quiet --profile "$profile" --package attn-eval --example bench_heads
exec python3 scripts/bench/run_heads.py --ours "target/${profile/#dev/debug}/examples/bench_heads" --out runs/bench-heads "$@"
