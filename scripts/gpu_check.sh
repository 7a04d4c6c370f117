#!/usr/bin/env bash
# Checks and times this project on a machine with a GPU that has LibTorch 2.11.0 and no Rust.
#
# Usage: scripts/gpu_check.sh pack DIR      here: builds, and fills the new folder DIR with what travels (80 MB)
#        DIR/gpu_check.sh run [OUT]         there: runs the CUDA checks, then the benchmarks that need no data (`train` and
#                                           `generate` of bench_finetune.sh), and prints a short table; OUT (gpu-check)
#                                           gets the logs and figures
#
# There, LibTorch is that of $LIBTORCH, else of $PYTHON (python3) with torch 2.11.0 and CUDA. Where that Python has
# transformers too, the benchmarks compare with it; else they time our side alone. GPT-2's shape is in the pack: no network.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

# The test binaries with CUDA checks in them: crate, file, names of the checks (cargo's filter).
CHECKS="attn-torch cuda
attn-torch cuda_order
attn-core golden cuda
attn-core laws cuda
attn-core checkpoint cuda
attn-train resume cuda"

pack() {
  local to=$1
  [ ! -e "$to" ] || fail "\`$to\` is there already: name a new folder"
  mkdir -p "$to"
  to=$(cd "$to" && pwd)
  cd "$here/.."
  scripts/setup_env.sh
  local built
  built=$(cargo test --workspace --no-run --message-format=json) || fail "the tests do not build"
  cargo build --quiet --package attn-train --example bench
  mkdir -p "$to/bin" "$to/bench" "$to/gpt2"
  while read -r crate file _; do
    local path
    path=$(grep -F "/crates/$crate/tests/$file.rs\"" <<< "$built" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
    [ -n "$path" ] || fail "cargo built no tests of $crate/tests/$file.rs"
    strip -o "$to/bin/$crate-$file" "$path"
  done <<< "$CHECKS"
  strip -o "$to/bin/bench" target/debug/examples/bench
  mkdir -p "$to/attn-core/tests"
  cp -r crates/attn-core/tests/golden "$to/attn-core/tests/"
  cp scripts/bench/run.py scripts/bench/theirs.py "$to/bench/"
  cp scripts/gpu_check.sh "$to/"
  # GPT-2's published sizes are the defaults of its config.
  printf '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}\n' > "$to/gpt2/config.json"
  git rev-parse HEAD > "$to/commit"
  git diff --quiet HEAD -- || printf 'with uncommitted changes\n' >> "$to/commit"
  du -sh "$to"
}

run() {
  local out=${1:-gpu-check} python=${PYTHON:-python3} torch version
  [ -d "$here/bin" ] || fail "\`$here\` is no pack: make one with \`scripts/gpu_check.sh pack DIR\`"
  if [ -n "${LIBTORCH:-}" ]; then
    torch=$LIBTORCH
    version=$(cat "$torch/build-version" 2>/dev/null || sed -n "s/^__version__ = '\(.*\)'/\1/p" "$torch/version.py" 2>/dev/null) ||
      fail "\`$torch\` has neither build-version nor version.py: LIBTORCH names no LibTorch"
  else
    torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || fail "\`$python\` has no torch: set LIBTORCH or PYTHON"
    version=$("$python" -c 'import torch; print(torch.__version__)')
  fi
  [[ $version == 2.11.0* ]] || fail "LibTorch in \`$torch\` is $version, expected 2.11.0"
  [ -e "$torch/lib/libtorch_cuda.so" ] || fail "LibTorch in \`$torch\` has no CUDA (libtorch_cuda.so)"
  export LD_LIBRARY_PATH="$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  mkdir -p "$out"
  local table="$out/table.md" failed=0
  {
    printf '# CUDA checks and benchmarks\n\ncommit %s, LibTorch %s, ' "$(tr '\n' ' ' < "$here/commit")" "$version"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -1 || printf 'no nvidia-smi\n'
    printf '\n| checks | passed | failed | skipped |\n| --- | --- | --- | --- |\n'
  } | tee "$table"
  while read -r crate file filter; do
    local log="$out/$crate-$file.log" rc=0
    CARGO_MANIFEST_DIR="$here/$crate" "$here/bin/$crate-$file" $filter --test-threads=1 > "$log" 2>&1 || rc=$?
    local ok bad skipped
    read -r ok bad <<< "$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed.*/\1 \2/p' "$log")"
    skipped=$(grep -c '^SKIPPED' "$log" || true)
    # A check that was skipped checked nothing, and so did a binary without one.
    if [ "$rc" -ne 0 ] || [ "$skipped" -ne 0 ] || [ "${ok:-0}" -eq 0 ]; then failed=1; fi
    printf '| %s %s | %d | %d | %d |\n' "$crate" "$file" "$((${ok:-0} - skipped))" "${bad:-0}" "$skipped" | tee -a "$table"
  done <<< "$CHECKS"
  [ "$failed" -eq 0 ] || fail "CUDA checks failed or were skipped: see \`$out\`"
  local compare=()
  if "$python" -c 'import transformers' 2>/dev/null; then
    compare=(--python "$python")
  else
    printf '\nno transformers in `%s`: our side alone\n' "$python" | tee -a "$table"
  fi
  BENCH_DEVICE=cuda BENCH_GPT2="$here/gpt2" HF_HUB_OFFLINE=1 "$python" "$here/bench/run.py" "${compare[@]}" \
    --ours "$here/bin/bench" --out "$out" --section train --section generate | tee -a "$table"
}

case "${1:-}" in
  pack) [ $# -eq 2 ] || fail "name the folder: scripts/gpu_check.sh pack DIR"; pack "$2" ;;
  run) shift; run "$@" ;;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
