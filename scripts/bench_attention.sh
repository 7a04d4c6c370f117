#!/usr/bin/env bash
# Times every attention kind against LibTorch's fused softmax attention on this machine, in turns, from projected q, k and v
# to z (12 heads of 64, causal, f32), forward and back, and counts memory above the inputs. Prints a table as CSV.
#
# Usage: scripts/bench_attention.sh [--threads N] [--rounds N] [--kinds NAME,...] [--out FILE] [LENGTH...]
#   N       threads (2), and times that each kind runs at each length (3); a figure is the median
#   NAME    kinds to run beside fused attention (all; a wrong name lists them)
#   FILE    where the table goes, too (runs/bench-attention.csv)
#   LENGTH  tokens, ascending (1024 2048 4096 8192 16384 32768); kinds that would take minutes at one are left out there
#
# Columns: times in ms, and fused attention's time over them; processor time of all threads, the same ratio of it, and the x
# in n^x since the length before; the most memory held at once in MiB beyond inputs; operations that the kind cannot do
# without in a second of processor time, and their share of what LibTorch's product of matrices of 1,024 reaches in the same run.
# On a busy machine processor time is the fairer one, with one thread: threads that wait for each other spin.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
threads=2 rounds=3 out=runs/bench-attention.csv kinds=()
while [[ "${1:-}" == --* ]]; do
  [ $# -ge 2 ] || { echo "error: \`$1\` wants a value" >&2; exit 2; }
  case "$1" in
    --threads) threads=$2 ;;
    --rounds) rounds=$2 ;;
    --kinds) kinds=(--kinds "$2") ;;
    --out) out=$2 ;;
    *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
  shift 2
done
[ $# -gt 0 ] || set -- 1024 2048 4096 8192 16384 32768
scripts/setup_env.sh
mkdir -p "$(dirname "$out")"
# Whole or not at all.
cargo run --quiet --release --package attn-core --features testing --example bench_attention -- \
  "$threads" "$rounds" "$@" ${kinds[@]+"${kinds[@]}"} | tee "$out.partial"
mv "$out.partial" "$out"
