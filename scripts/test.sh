#!/usr/bin/env bash
# Sets up what is missing and runs every test, those in the documentation included.
#
# Usage: scripts/test.sh [ARGUMENT...]
#   The arguments are those of `cargo test`: `scripts/test.sh -p attn-data`, `scripts/test.sh -- --ignored`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh
# One crate that fails should not hide what the others have to say.
exec cargo test --workspace --no-fail-fast "$@"
