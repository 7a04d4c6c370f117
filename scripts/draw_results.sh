#!/usr/bin/env bash
# Draws every stored result that has a picture anew.
#
# Usage: scripts/draw_results.sh [OUT]
#   OUT  where the pictures go, a folder for each of results/ (runs/pictures)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/pictures}
scripts/setup_env.sh
cargo build --quiet --package attn-cli
n=0
skipped=0
while IFS= read -r file; do
  folder=${file#results/}
  folder=$out/$(dirname "$folder")
  # A run is drawn as a whole, from its folder.
  [[ $file == */metrics.jsonl ]] && file=$(dirname "$file")
  mkdir -p "$folder"
  if drawn=$(target/debug/attn --quiet plot "$file" --out "$folder" 2>/dev/null); then
    n=$((n + $(wc -l <<<"$drawn")))
  else
    skipped=$((skipped + 1))
  fi
done < <(find results -path results/models -prune -o \( -name '*.json' -o -name metrics.jsonl -o -name '*.csv' \) -print | sort)
echo "$n pictures under $out; $skipped files are of no kind that is drawn"
