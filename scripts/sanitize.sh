#!/usr/bin/env bash
# Runs under Miri and the sanitizers what can be run under them. By hand: half an hour of a core.
#
#   miri   unit tests of attn-viz and attn-data that map no file, start no thread of a C library and ask no network: undefined
#          behaviour of Rust code. Wants a nightly toolchain with `miri` and `rust-src`.
#   asan   the C++ kernels of attn-torch that stand alone, without LibTorch (scripts/sanitize_kernels.cpp): addresses and undefined
#          behaviour of C++ code. Wants g++.
#
# Usage: scripts/sanitize.sh [miri|asan]...     (both where none is named)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- asan miri

asan() {
  local bin=target/sanitize_kernels kernels=crates/attn-torch/cpp
  mkdir -p target
  # As build.rs compiles them, once for each level of instructions, with both sanitizers and no way past a finding.
  for level in ${LEVELS:-plain avx2}; do
    local flags=""
    [ "$level" = plain ] || flags="-mavx2 -mfma"
    # shellcheck disable=SC2086  # a list of flags
    g++ -std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all \
      $flags -DATTN_ISA=sanitized -I"$kernels" "$kernels"/*_kernels.cpp scripts/sanitize_kernels.cpp -o "$bin"
    ASAN_OPTIONS=detect_leaks=1 "$bin"
    # A buffer that is too short is found: that the sanitizers are at work.
    if "$bin" short 2>/dev/null; then
      echo "error: a read past a buffer was not found" >&2
      exit 1
    fi
    echo "asan: kernels for $level instructions are in order"
  done
}

miri() {
  if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo 'SKIPPED: miri is not installed; "rustup component add miri rust-src --toolchain nightly"' >&2
    return
  fi
  # Files and clocks are the system's; what Miri is asked for is in memory.
  export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-deterministic-floats" CARGO_TARGET_DIR=target/miri
  # In place of the repository's own runner, which starts programs.
  local runner host
  runner=$(rustup which --toolchain nightly cargo-miri)
  host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
  export "CARGO_TARGET_${host}_RUNNER=$runner runner"
  cargo +nightly miri test -p attn-viz --lib -- --skip two_models_take_less_than_5_mib  # a page of five MiB
  cargo +nightly miri test -p attn-data --lib -- batch:: select:: needle:: prompt::
}

for what in "$@"; do
  case $what in
    miri | asan) "$what" ;;
    *)
      echo "error: \`$what\` is neither miri nor asan" >&2
      exit 2
      ;;
  esac
done
