#!/usr/bin/env bash
# Every way to merge key/value heads, with and without a refit, under five draws of the text that is read, against what the model was.
#
#   scripts/gqa_experiment.sh OUT MODEL "N N ..." [FLAGS OF attn convert, such as --calibration wikitext-2 --layers 3]
#
# Writes OUT/N-SEED.json, the conversion.json of each, and prints a table. The blocks that models are compared on are the same for
# every draw. A run is skipped where its file is there.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
here="$(cd "$(dirname "$0")/.." && pwd)"
cd "$here"
out="$1" model="$2" numbers="$3"
shift 3
attn="${ATTN:-}"
run() { if [ -n "$attn" ]; then "$attn" "$@"; else cargo run --quiet --manifest-path "$here/Cargo.toml" -p attn-cli -- "$@"; fi; }
mkdir -p "$out"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for n in $numbers; do
    for seed in 0 1 2 3 4; do
        file="$out/$n-$seed.json"
        [ -e "$file" ] && continue
        run convert --model "$model" --kv-heads "$n" --seed "$seed" --compare --force --out "$folder/model" "$@" >&2
        cp "$folder/model/conversion.json" "$file.part" && mv "$file.part" "$file"
    done
done
python3 "$here/scripts/gqa_table.py" "$out"
