#!/usr/bin/env bash
# Times decoding with fewer key/value heads, against all of them and against transformers on the same folders, in turns; and times
# converting.
#
# Usage: scripts/bench_gqa.sh --python PYTHON [--section decode|convert]... [--heads N...] [--convert "FLAGS"]... [--threads N]
#                             [--rounds N] [--out DIR]
#   PYTHON  a Python with transformers (scripts/setup_peers.sh --all makes one and prints its path)
#   FLAGS   of `attn convert`, without --out: --model DIR --kv-heads 3 --refit --calibration wikitext-2; may be repeated
#   N       key/value heads (8 4 2 1), threads of each side (2), turns that each takes (3)
#   DIR     where the figures go, a JSON file and a table a section (runs/bench-gqa)
#
# `decode`: a Llama of 8 layers, 512 wide, 8 heads, random weights, 8 rows behind 4,096 tokens. What the bytes of the cache
# allow: a step without a context, and of the time that a step with all heads takes longer than that, the share of the bytes that is left. Our side is built in the dev
# profile, as every command of the README is; PROFILE=release builds the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " != *" --python"* ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
profile=${PROFILE:-dev}
scripts/setup_env.sh
cargo build --quiet --profile "$profile" --package attn-eval --example bench_gqa
cargo build --quiet --profile "$profile" --package attn-cli
bin="target/${profile/#dev/debug}"
exec python3 scripts/bench/run_gqa.py --ours "$bin/examples/bench_gqa" --attn "$bin/attn" --out runs/bench-gqa "$@"
