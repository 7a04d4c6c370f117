#!/usr/bin/env bash
# Cargo's runner (see .cargo/config.toml): starts a binary with LibTorch on its library path.
set -euo pipefail
lib="${LIBTORCH:-$(dirname "$0")/../.libtorch}/lib"
LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$@"
