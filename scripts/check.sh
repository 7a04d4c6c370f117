#!/usr/bin/env bash
# Checks figures in documents against their files, form, lints, documentation, a crate that builds on ours, packaging,
# and what it all is made of (licences, sources, advisories, a bill of materials); a warning fails. `scripts/test.sh` runs the tests.
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

# What the binary is made of: a bill of materials is made and read back, licences and sources are looked at.
python3 scripts/sbom.py
if cargo deny --version >/dev/null 2>&1; then
  cargo deny --log-level error check licenses bans sources
  # The database of advisories is fetched; where it cannot be had, nothing is known, and that is said.
  if ! found=$(cargo deny --log-level error check advisories 2>&1); then
    case $found in
      *"failed to fetch advisory database"*) echo "SKIPPED: advisories, as RustSec's database cannot be fetched" ;;
      *)
        printf '%s\n' "$found" >&2
        exit 1
        ;;
    esac
  fi
else
  echo 'SKIPPED: licences and advisories, as cargo-deny is not installed; "cargo install cargo-deny --locked"'
fi
echo "check: form, lints and documentation are in order"
