#!/usr/bin/env bash
# One head a layer against many: kept, merged and random, beside models of the same parameters and operations, tuned alike.
#
# Usage: scripts/single_head_experiment.sh [OUT]
#   OUT (runs/single-head) gets the scores of the heads of results/models/wikitext-gpt2 on WikiText-2, the folders without heads,
#   and the sweep over them (OUT/tuned).
#   ATTN names a program built before; `cargo run` otherwise. 40 minutes on one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=results/models/wikitext-gpt2
out=${1:-runs/single-head}
attn() { if [ -n "${ATTN:-}" ]; then "$ATTN" "$@"; else cargo run --quiet --package attn-cli -- "$@"; fi; }

if [ -e "$out" ]; then
  echo "error: $out is there already; name another folder, or remove it" >&2
  exit 1
fi
mkdir -p "$out"
attn score-heads --model $model --task wikitext-2 --split train --limit 2000 --max-len 256 --method michel --threads 1 --out "$out/scores.json"
prune=(attn prune --model $model --scores "$out/scores.json")
"${prune[@]}" --per layer --remove 5 --which bottom --out "$out/kept-best"
"${prune[@]}" --per layer --remove 3 --which bottom --out "$out/three-of-six"
"${prune[@]}" --remove 20 --which bottom --out "$out/four-anywhere"
seed=0
for draw in a b c; do
  "${prune[@]}" --per layer --remove 5 --which random --seed $seed --out "$out/kept-random-$draw"
  seed=$((seed + 1))
done
# The same sweep over the folders in OUT.
sed -e "s#\"runs/single-head/#\"$out/#g" -e "s#^base = .*#base = \"$PWD/configs/finetune/sst2.toml\"#" configs/heads/single_head.toml >"$out/single_head.toml"
attn sweep "$out/single_head.toml" --out "$out/tuned"
