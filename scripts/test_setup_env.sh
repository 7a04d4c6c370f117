#!/usr/bin/env bash
# Tests setup_env.sh: each thing that can go wrong gives one message with a hint, and what was half done is repaired.
# Needs no network: a package index on disk serves wheels that are LibTorch in name only. Takes about a minute.
#
# Usage: scripts/test_setup_env.sh
# shellcheck disable=SC2016 # backquotes and dollars are for patterns and for tools made here
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# A machine with just the tools that the script may count on, each of which a test can take away.
machine() {
  rm -rf "${work:?}/bin" "$work/repo"
  mkdir -p "$work/bin" "$work/repo/scripts"
  local tool
  for tool in awk bash cat cc c++ df dirname env getconf grep head ldd ln mkdir readlink rm sed sleep sort tail uname; do
    ln -s "$(command -v "$tool")" "$work/bin/$tool"
  done
  ln -s "$(python3 -c 'import sys; print(sys.executable)')" "$work/bin/python3"
  fake cargo 'echo cargo 99.0.0'
  fake ldd true
  cp "$here/scripts/setup_env.sh" "$work/repo/scripts"
  cp "$here/Cargo.toml" "$work/repo"
}

# fake TOOL SCRIPT: puts a tool in place of the real one.
fake() {
  rm -f "$work/bin/$1"
  printf '#!/bin/bash\n%s\n' "$2" >"$work/bin/$1"
  chmod +x "$work/bin/$1"
}

# libtorch FOLDER VERSION: what looks like a LibTorch.
libtorch() {
  local file
  for file in lib/libtorch_cpu lib/libc10 lib/libtorch; do mkdir -p "$1/lib" && : >"$1/$file.so"; done
  mkdir -p "$1/include/ATen" "$1/include/torch/headeronly"
  : >"$1/include/ATen/ATen.h"
  awk -v version="$2" 'BEGIN { split(version, n, "."); split("MAJOR MINOR PATCH", part, " ")
    for (i = 1; i <= 3; i++) printf "#define TORCH_VERSION_%s %s\n", part[i], n[i] }' >"$1/include/torch/headeronly/version.h"
}

# wheel NAME VERSION FOLDER: packs FOLDER, which may be empty, as a wheel of the index.
wheel() {
  python3 - "$1" "$2" "$3" "$work/index" <<'PY'
import pathlib, sys, zipfile
name, version, folder, index = sys.argv[1:]
info = f"{name}-{version}.dist-info"
with zipfile.ZipFile(pathlib.Path(index) / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
    for path in sorted(pathlib.Path(folder).rglob("*")):
        wheel.write(path, path.relative_to(folder))
    wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", "")
PY
}

# setup [VARIABLE=VALUE...] [-- ARGUMENT...]: runs the script on the machine; its output and status are kept.
setup() {
  local vars=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do vars+=("$1"); shift; done
  [ $# -eq 0 ] || shift
  status=0
  output=$(cd / && env -i PATH="$work/bin" HOME="$work" PIP_NO_INDEX=1 PIP_FIND_LINKS="$work/index" "${vars[@]}" \
    bash "$work/repo/scripts/setup_env.sh" "$@" 2>&1 </dev/null) || status=$?
}

# expect NAME STATUS PATTERN: what the last run has to have ended with. A failure is one error and one hint.
expect() {
  local wrong=
  [ "$status" = "$2" ] || wrong="status $status"
  grep -qE -- "$3" <<<"$output" || wrong="$wrong, no match"
  if [ "$2" != 0 ]; then
    [ "$(grep -c '^error: ' <<<"$output")" = 1 ] || wrong="$wrong, not one error"
    [ "$(tail -n 1 <<<"$output" | cut -c 1-6)" = "hint: " ] || wrong="$wrong, no hint at the end"
  fi
  if [ -z "$wrong" ]; then echo "ok: $1"; else
    failures=$((failures + 1))
    printf 'FAILED: %s (%s; %s expected)\n%s\n' "$1" "${wrong#, }" "$3" "$output"
  fi
}

mkdir -p "$work/index" "$work/package" "$work/empty"
libtorch "$work/package/torch" 2.11.0
wheel torch 2.11.0 "$work/package"
wheel nvidia_cuda_runtime 13.0.96 "$work/empty"
wheel nvidia_cuda_cupti 13.0.85 "$work/empty"
libtorch "$work/old" 2.10.0
libtorch "$work/own" 2.11.0

machine; setup -- gpu; expect "an unknown kind" 1 'error: `gpu` is no kind'
machine; rm "$work/bin/cargo"; setup; expect "no cargo" 1 'error: cargo is not installed'
machine; fake cargo 'echo cargo 1.70.0'; setup; expect "an old cargo" 1 'error: Rust is 1.70.0, [0-9.]+ or newer'
machine; fake cargo 'exit 1'; setup; expect "a cargo without a toolchain" 1 'error: cargo is installed but does not run'
machine; rm "$work/bin/c++"; setup; expect "no C++ compiler" 1 'error: there is no C\+\+ compiler'
machine; fake c++ 'exit 1'; setup; expect "a C++ compiler that is too old" 1 'does not compile C\+\+17'
machine; setup CXX=clang++-99; expect "a CXX that does not exist" 1 '`clang\+\+-99` is not on PATH'
machine; rm "$work/bin/cc"; setup; expect "no linker" 1 'error: there is no linker driver'
machine; rm "$work/bin/python3"; setup; expect "no python3" 1 'error: python3 is not installed'
machine; fake python3 'exit 1'; setup; expect "a python3 without venv" 1 'error: python3 is there, but without its venv'
machine
fake python3 'case "$2" in *version_info*) exit 1 ;; *python_version*) echo 3.9.2 ;; esac'
setup; expect "a python3 that is too old" 1 'error: python3 is 3.9.2, PyPI has LibTorch'
machine; fake uname 'case $1 in -s) echo FreeBSD ;; -m) echo amd64 ;; esac'; setup; expect "another system" 1 'FreeBSD on amd64 is not supported'
machine; fake getconf 'exit 1'; setup; expect "no glibc" 1 'error: this Linux has no glibc'
machine; fake df 'printf "Filesystem 1M-blocks Used Available Capacity Mounted\n/dev/x 9999 9500 499 95%% /\n"'
setup -- cpu; expect "a disk that is too small" 1 'error: the disk is too small: .* 499 MB are free'
setup LIBTORCH="$work/own"; expect "a disk that is too small to build" 1 'the first build takes 3500 MB'
machine; setup LIBTORCH="$work/old"; expect "LIBTORCH of another version" 1 'it is LibTorch 2.10.0, 2.11.0 is needed'
machine; setup LIBTORCH="$work/none"; expect "LIBTORCH that does not exist" 1 'there is no such folder'
machine; setup LIBTORCH="$work/empty"; expect "LIBTORCH that is something else" 1 'it has no lib/libtorch_cpu'
machine; setup LIBTORCH="$work/own" -- cuda; expect "LIBTORCH without CUDA where CUDA is asked for" 1 'has no working CUDA'
machine; fake ldd 'echo "libmissing.so => not found"'; setup LIBTORCH="$work/own"
expect "LIBTORCH that lacks a library" 1 'libraries that it needs are missing'
machine; setup LIBTORCH="$work/own"; expect "LIBTORCH of the right version" 0 "ready: $work/own"
setup; expect "and without the variable afterwards" 0 "ready: $work/own"

machine; setup PIP_FIND_LINKS="$work/empty" -- cpu; expect "an index without LibTorch" 1 'the package index has no LibTorch 2.11.0'
machine; setup PIP_NO_INDEX=0 PIP_INDEX_URL=http://127.0.0.1:9/simple PIP_RETRIES=1 PIP_FIND_LINKS= -- cpu
expect "no network" 1 'error: LibTorch was not installed: no network'
[ -s "$work/repo/target/setup_env.log" ] || { failures=$((failures + 1)); echo "FAILED: the log is kept"; }

machine; setup -- cpu; expect "an installation" 0 'downloading LibTorch 2.11.0 \(cpu\).* 544 MB'
before=$(cd "$work/repo" && ls -lR .venv .libtorch)
setup; expect "running it again" 0 '^setup: LibTorch 2.11.0 is ready'
if grep -q downloading <<<"$output" || [ "$before" != "$(cd "$work/repo" && ls -lR .venv .libtorch)" ]; then
  failures=$((failures + 1)) && echo "FAILED: running it again changes nothing"
fi
site=$(echo "$work"/repo/.venv/lib/python3.*/site-packages)
rm "$work/repo/.libtorch"; setup; expect "a link that was removed" 0 '^setup: LibTorch 2.11.0 is ready'
rm -r "$site"/torch-2.11.0.dist-info "$site/torch/lib"; setup -- cpu; expect "an unpacking that was interrupted" 0 'was not finished: repairing'
rm -r "$work/repo/.venv/bin" "$site"/torch-2.11.0.dist-info; setup -- cpu; expect "an environment that was interrupted" 0 'was not finished: repairing'
rm "$work/repo/.libtorch" && mkdir "$work/repo/.libtorch"; setup -- cpu; expect "a .libtorch that is a folder of something else" 1 '.libtorch cannot be used'


if uv=$(command -v uv); then
  machine; ln -s "$uv" "$work/bin/uv"
  setup UV_FIND_LINKS="$work/index" UV_OFFLINE=1 -- cpu; expect "an installation by uv" 0 '^setup: LibTorch 2.11.0 is ready'
  site=$(echo "$work"/repo/.venv/lib/python3.*/site-packages)
  rm -r "$site"/torch-2.11.0.dist-info "$site/torch/lib"
  setup UV_FIND_LINKS="$work/index" UV_OFFLINE=1 -- cpu; expect "an unpacking by uv that was interrupted" 0 'repairing'
  machine; ln -s "$uv" "$work/bin/uv"
  setup UV_INDEX_URL=http://127.0.0.1:9/simple UV_HTTP_RETRIES=0 -- cpu; expect "no network for uv" 1 'error: LibTorch was not installed: no network'
  machine; ln -s "$uv" "$work/bin/uv"
  setup UV_FIND_LINKS="$work/empty" UV_OFFLINE=1 -- cpu; expect "an index without LibTorch for uv" 1 'the package index has no LibTorch 2.11.0'
else
  echo "SKIPPED: uv is not installed"
fi

if [ "$failures" != 0 ]; then echo "$failures failed"; exit 1; fi
echo "all passed"
