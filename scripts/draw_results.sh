#!/usr/bin/env bash
# Draws every stored result anew: for each folder of results/ a report of all that is in it, and its pictures.
#
# Usage: scripts/draw_results.sh [--pictures] [OUT]
#   --pictures  the pictures as files, too, beside the reports that hold them
#   OUT         where they go, a folder for each of results/ (runs/pictures)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
with_pictures=
[ "${1:-}" = --pictures ] && with_pictures=yes && shift
out=${1:-runs/pictures}
scripts/setup_env.sh
cargo build --quiet --package attn-cli
attn=target/debug/attn
said=$(mktemp)
trap 'rm -f "$said"' EXIT
reports=0 pictures=0 failed=0

# What is of no kind that is shown is no failure; whatever else goes wrong is, and is told.
fails() {
  grep -qE "is no result that can be drawn|there is no run or result in" "$said" && return 1
  sed "s|^|$1: |" "$said" >&2
  failed=$((failed + 1))
}

for folder in results/2*/; do
  name=$(basename "$folder")
  if "$attn" --quiet report "$folder" --title "$name" --out "$out/$name/report.html" >/dev/null 2>"$said"; then
    reports=$((reports + 1))
  else
    fails "$folder" || echo "$name: no result of a kind that a report shows"
  fi
  [ -n "$with_pictures" ] || continue
  while IFS= read -r file; do
    # A run is drawn as a whole, from its folder.
    [[ $file == */metrics.jsonl ]] && file=$(dirname "$file")
    beside=$out/$(dirname "${file#results/}")
    if drawn=$("$attn" --quiet plot "$file" --out "$beside" 2>"$said"); then
      pictures=$((pictures + $(wc -l <<<"$drawn")))
    else
      fails "$file" || true
    fi
  done < <(find "$folder" \( -name '*.json' -o -name metrics.jsonl -o -name '*.csv' \) -print | sort)
done
echo "$reports reports and $pictures pictures under $out; $failed could not be drawn"
[ "$failed" = 0 ]
