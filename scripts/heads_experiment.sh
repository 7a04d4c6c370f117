#!/usr/bin/env bash
# Which heads of a tuned classifier matter: scores, what leaving heads out costs before tuning and after it.
#
# Usage: scripts/heads_experiment.sh CLASSIFIER [OUT [DRAWS]]
#   CLASSIFIER: the model folder of a run of configs/finetune/sst2.toml. OUT (runs/heads) gets the scores of the train split's
#   first 2,000 rows, the curve on the validation split, the folders without heads, and the sweep over them (OUT/retuned).
#   DRAWS (0): so many random choices more, tuned on under seed 0 alone (OUT/band); with 17 there are twenty.
#   ATTN names a program built before; `cargo run` otherwise. An hour on one core for a model of four layers, and half an hour for 17 draws.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
classifier=${1:?name the model folder of a tuned classifier}
out=${2:-runs/heads}
draws=${3:-0}
attn() { if [ -n "${ATTN:-}" ]; then "$ATTN" "$@"; else cargo run --quiet --package attn-cli -- "$@"; fi; }
task=(--task sst2 --max-len 64 --threads 1)

if [ -e "$out" ]; then
  echo "error: $out is there already; name another folder, or remove it" >&2
  exit 1
fi
mkdir -p "$out"
attn score-heads --model "$classifier" "${task[@]}" --split train --limit 2000 --method michel,leave_one_out --out "$out/scores.json"
for per in model layer; do
  attn prune-curve --model "$classifier" "${task[@]}" --scores "$out/scores.michel.json" --scores "$out/scores.leave_one_out.json" \
    --per $per --out "$out/curve-$per.json" --plot "$out/curve-$per.png"
done

cp -r "$classifier" "$out/untouched"
band=
for k in 2 4; do
  prune=(attn prune --model "$classifier" --scores "$out/scores.michel.json" --per layer --remove $k)
  "${prune[@]}" --which top --out "$out/top-$k"
  "${prune[@]}" --which bottom --out "$out/bottom-$k"
  seed=0
  for draw in a b c; do
    "${prune[@]}" --which random --seed $seed --out "$out/random-$k-$draw"
    seed=$((seed + 1))
  done
  for ((more = 0; more < draws; more++)); do
    "${prune[@]}" --which random --seed $((seed + more)) --out "$out/random-$k-$((seed + more))"
    band+="\"$out/random-$k-$((seed + more))\", "
  done
done
# The same sweep over the folders in OUT.
sed -e "s#\"runs/heads/#\"$out/#g" -e "s#^base = .*#base = \"$PWD/configs/heads/retune.toml\"#" configs/heads/prune.toml >"$out/prune.toml"
attn sweep "$out/prune.toml" --out "$out/retuned"
if [ -n "$band" ]; then
  { sed -e '/^\[grid\]/,$d' -e 's/^seeds = .*/seeds = [0]/' "$out/prune.toml" && printf '[grid]\nmodel = [%s]\n' "$band"; } >"$out/band.toml"
  attn sweep "$out/band.toml" --out "$out/band"
fi
