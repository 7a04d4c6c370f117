#!/usr/bin/env bash
# Checks figures in documents against their files, form, lints, documentation, a crate that builds on ours, and packaging; a warning
# fails. `scripts/test.sh` runs the tests.
#
# Usage: scripts/check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh

for tool in fmt clippy; do
  if ! cargo "$tool" --version >/dev/null 2>&1; then
    printf 'error: "cargo %s" is not installed\nhint: run "rustup component add rustfmt clippy"\n' "$tool" >&2
    exit 1
  fi
done

python3 scripts/figures.py
python3 scripts/slides.py --check docs/report.md
cargo fmt --all --check
cargo clippy --workspace --all-targets -- -D warnings
# Only rustdoc's flags: other compiler flags would have every dependency built again.
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# A crate of its own that builds on ours, and ours as other teams would be given them.
own=examples/own-kind/Cargo.toml
cargo fmt --manifest-path "$own" --check
cargo run --quiet --locked --manifest-path "$own" --target-dir target -- results/models/tiny-mlm >/dev/null
cargo package --quiet --workspace --exclude attn-fuzz --allow-dirty --no-verify
echo "check: form, lints and documentation are in order"
