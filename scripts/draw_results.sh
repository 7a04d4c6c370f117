#!/usr/bin/env bash
# Draws every stored result anew: in each folder of results/ a report of all that is in it, report.html, with its pictures.
#
# Usage: scripts/draw_results.sh [DIR]
#   DIR  the pictures as files, too, in a folder for each of results/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh
cargo build --quiet --package attn-cli
attn=target/debug/attn
# A report that is larger is divided: one for each folder in it.
most=$((5 << 20))
said=$(mktemp)
trap 'rm -f "$said"' EXIT
reports=0 pictures=0 failed=0

# What is of no kind that is shown is no failure; whatever else goes wrong is, and is told.
fails() {
  grep -qE "is no result that can be drawn|there is no run or result in" "$said" && return 1
  sed "s|^|$1: |" "$said" >&2
  failed=$((failed + 1))
}

report() {
  if "$attn" --quiet report "$@" >/dev/null 2>"$said"; then
    reports=$((reports + 1))
  else
    fails "$1" || echo "$1: no result of a kind that a report shows"
  fi
}

for folder in results/2*/; do
  folder=${folder%/}
  name=$(basename "$folder")
  rm -f "$folder"/report*.html
  report "$folder" --title "$name" --out "$folder/report.html"
  if [ -f "$folder/report.html" ] && [ "$(wc -c <"$folder/report.html")" -gt "$most" ]; then
    rm "$folder/report.html"
    reports=$((reports - 1))
    for part in "$folder"/*/; do
      part=${part%/}
      report "$part" --title "$name, $(basename "$part")" --out "$folder/report-$(basename "$part").html"
    done
    # And one for the files that stand beside the folders.
    own=()
    for file in "$folder"/*.json; do
      "$attn" --quiet report "$file" --out "$folder/report.html" >/dev/null 2>&1 && own+=("$file")
    done
    rm -f "$folder/report.html"
    [ ${#own[@]} = 0 ] || report "${own[@]}" --title "$name" --out "$folder/report.html"
  fi
  [ -n "${1:-}" ] || continue
  while IFS= read -r file; do
    # A run is drawn as a whole, from its folder.
    [[ $file == */metrics.jsonl ]] && file=$(dirname "$file")
    if drawn=$("$attn" --quiet plot "$file" --out "$1/$(dirname "${file#results/}")" 2>"$said"); then
      pictures=$((pictures + $(wc -l <<<"$drawn")))
    else
      fails "$file" || true
    fi
  done < <(find "$folder" \( -name '*.json' -o -name metrics.jsonl -o -name '*.csv' \) -print | sort)
done
echo "$reports reports in results/, $pictures pictures; $failed could not be drawn"
[ "$failed" = 0 ]
