#!/usr/bin/env bash
# Sets up LibTorch: installs it from PyPI into ./.venv and links ./.libtorch to it. Plain cargo commands then need no
# exported variable. Running it again is fast and changes nothing.
#
# Usage: scripts/setup_env.sh [cpu|cuda|auto]
#   cpu    LibTorch for the CPU: 544 MB to download, 1.3 GB on disk
#   cuda   with CUDA and all it needs: 2.6 GB to download, 4.6 GB on disk
#   auto   what is there already, else cuda where there is an NVIDIA GPU, else cpu (the default)
#
# An exported LIBTORCH is used instead of a download, if it is the right version.
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=2.11.0 # exactly what tch 0.24 is written for; `attn doctor` names the same
log=target/setup_env.log

say() { printf 'setup: %s\n' "$*" >&2; }

# fail MESSAGE HINT: the one message that a failed set-up ends with.
fail() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 1
}

# at_least VERSION MINIMUM: compares dotted numbers.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# The version that the headers of a LibTorch folder state; nothing if it has none.
version_of() {
  awk '/^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) / { printf "%s%s", dot, $3; dot = "." }' \
    "$1/include/torch/headeronly/version.h" "$1/include/torch/csrc/api/include/torch/version.h" 2>/dev/null || true
}

# What is wrong with a LibTorch folder, in a few words; nothing if it can be built against.
problem_of() {
  local name version
  if [ ! -d "$1" ]; then echo "there is no such folder"; return; fi
  for name in lib/libtorch_cpu.so lib/libc10.so lib/libtorch.so include/ATen/ATen.h; do
    if [ ! -e "$1/$name" ]; then echo "it has no $name"; return; fi
  done
  version=$(version_of "$1")
  if [ "$version" != "$wanted" ]; then echo "it is LibTorch ${version:-of unknown version}, $wanted is needed"; fi
}

# Whether a LibTorch folder has CUDA, with all that it links to.
has_cuda() { [ -e "$1/lib/libtorch_cuda.so" ] && links "$1/lib/libtorch_cuda.so"; }

has_gpu() { [ -e /proc/driver/nvidia/version ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }

# Whether pip or uv finished LibTorch in ./.venv: they name themselves in a package's folder last of all.
installed() { compgen -G ".venv/lib/python3.*/site-packages/torch-$wanted*.dist-info/INSTALLER" >/dev/null; }

# Whether all that a library links to is there.
links() { ! ldd "$1" 2>/dev/null | grep -q 'not found'; }

# Whether a LibTorch folder can be built against and serves what was asked for.
serves() {
  [ -z "$(problem_of "$1")" ] && links "$1/lib/libtorch_cpu.so" && { [ "$mode" != cuda ] || has_cuda "$1"; }
}

# Whether .libtorch does, and was not left half-way.
ready() {
  serves .libtorch && { [[ "$(readlink .libtorch || true)" != .venv/* ]] || installed; }
}

check_machine() {
  case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) cpu_mb=544 cuda_mb=2600 ;;
    Linux-aarch64) cpu_mb=435 cuda_mb=2600 ;; # PyPI has it; nobody has tried it
    *) fail "$(uname -s) on $(uname -m) is not supported" \
      "use Linux on x86-64 (or arm64, untried): a container or a virtual machine elsewhere, WSL on Windows" ;;
  esac
  getconf GNU_LIBC_VERSION >/dev/null 2>&1 || fail "this Linux has no glibc, which LibTorch is built for" \
    "use a distribution with glibc 2.28 or newer, such as Debian"
}

check_tools() {
  local wanted_rust rust cxx=${CXX:-c++}
  wanted_rust=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
  command -v cargo >/dev/null || fail "cargo is not installed (or not on PATH)" \
    "install Rust $wanted_rust or newer: https://rustup.rs"
  rust=$(cargo --version 2>/dev/null | awk '{ print $2 }') || true
  [ -n "$rust" ] || fail "cargo is installed but does not run" "install a toolchain: \`rustup default stable\`"
  at_least "${rust%%-*}" "$wanted_rust" || fail "Rust is $rust, $wanted_rust or newer is needed" \
    "run \`rustup update stable\`, or install it from https://rustup.rs"
  command -v "${cxx%% *}" >/dev/null || fail "there is no C++ compiler (\`$cxx\` is not on PATH)" \
    "install one: \`apt install g++\` or \`dnf install gcc-c++\`; or name yours in CXX"
  # Word splitting on purpose: CXX may hold `ccache g++`.
  # shellcheck disable=SC2086
  echo '#include <optional>' | $cxx -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
    fail "\`$cxx\` does not compile C++17" "install g++ 9 or newer, or clang 10 or newer with a C++ standard library"
  command -v cc >/dev/null || fail "there is no linker driver (\`cc\` is not on PATH)" "install gcc or clang"
}

# check_disk FOLDER MB WHAT: fails if the file system of FOLDER has less than MB free.
check_disk() {
  local free_mb
  free_mb=$(df -Pm "$1" 2>/dev/null | awk 'NR == 2 { print $4 }')
  if [ -n "$free_mb" ] && [ "$free_mb" -lt "$2" ]; then
    fail "the disk is too small: $3 takes $2 MB at $(cd "$1" && pwd -P), $free_mb MB are free" \
      "free some space; TMPDIR names the folder for temporary files"
  fi
}

# The first Python that PyPI has wheels of LibTorch for and that can make a virtual environment.
find_python() {
  local name
  python=
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      python=$name
      return
    fi
  done
}

check_python() {
  if command -v uv >/dev/null; then return; fi
  find_python
  if [ -n "$python" ]; then return; fi
  command -v python3 >/dev/null || fail "python3 is not installed; its pip fetches LibTorch" \
    "install it: \`apt install python3 python3-venv\`; or uv: https://docs.astral.sh/uv; or export LIBTORCH=/path/to/libtorch"
  python3 -c 'import venv, ensurepip' 2>/dev/null || fail "python3 is there, but without its venv module or pip" \
    "install them: \`apt install python3-venv\`; or uv: https://docs.astral.sh/uv"
  fail "python3 is $(python3 -c 'import platform; print(platform.python_version())'), PyPI has LibTorch $wanted for 3.10 to 3.14" \
    "install one of these, or uv: https://docs.astral.sh/uv"
}

# Runs the installer with its output in the log, and on the terminal as well if there is one to watch.
logged() {
  if [ -t 2 ] && [ "$installer" = pip ]; then "$@" 2>>"$log" >&2; else "$@" >>"$log" 2>&1; fi
}

# Sets `why` and `hint` from the log of pip or uv.
explain() {
  local again="and run this again"
  in_log() { grep -qE "$1" "$log"; }
  if in_log 'No space left on device'; then
    why="the disk filled up" hint="free some space $again; TMPDIR names the folder for temporary files"
  elif in_log 'ProxyError|Tunnel connection failed'; then
    why="the proxy refuses" hint="check HTTPS_PROXY and pip's \`proxy\` setting $again"
  elif in_log 'CERTIFICATE_VERIFY|invalid peer certificate|SSLError'; then
    why="the package index's certificate is not trusted" hint="check PIP_CERT and SSL_CERT_FILE $again"
  elif in_log 'name resolution|Name or service not known|dns error|nodename nor servname|Network is unreachable|Connection refused|[Tt]imed out|Connection aborted|ConnectError'; then
    why="no network: the package index does not answer" hint="connect, or check pip's index and proxy settings, $again"
  elif in_log 'No matching distribution|No solution found'; then
    why="the package index has no LibTorch $wanted for this machine, or does not answer"
    hint="check the network and pip's index setting (https://pypi.org/simple has it), or export LIBTORCH=/path/to/libtorch"
  else
    why=$(grep -iE '^ *(error|fatal)' "$log" | tail -n 1 | sed 's/^ *//') hint="see $log"
    [ -n "$why" ] || why="$installer failed"
  fi
}

# Fills ./.venv and links .libtorch to it.
install() {
  local packages flags=() reinstall=() mb=$cpu_mb disk_mb=1300 tmp=${TMPDIR:-/tmp}
  packages=("torch==$wanted")
  if [ "$mode" = cuda ]; then
    mb=$cuda_mb disk_mb=4600
    if installed; then mb=$((cuda_mb - cpu_mb)) disk_mb=3300; fi
  else
    # The wheel is built with CUDA and links these two even on the CPU; the other 2 GB it can do without.
    flags=(--no-deps) packages+=(nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
  fi
  if [ "$(df -P . | awk 'NR == 2 { print $6 }')" = "$(df -P "$tmp" | awk 'NR == 2 { print $6 }')" ]; then
    check_disk . $((disk_mb + mb)) "installing LibTorch"
  else
    check_disk . "$disk_mb" "LibTorch"
    check_disk "$tmp" "$mb" "the download"
  fi
  if [ -d .venv ] && ! installed; then say "an earlier set-up of .venv was not finished: repairing it"; fi

  : >"$log"
  say "downloading LibTorch $wanted ($mode) from the Python package index: $mb MB, then $disk_mb MB on disk in .venv"
  if command -v uv >/dev/null; then
    installer=uv
    usable_venv || logged uv venv --quiet --clear --python '>=3.10,<3.15' .venv || failed_install
    installed || reinstall=(--reinstall-package torch)
    logged uv pip install --quiet --python .venv/bin/python "${flags[@]}" "${reinstall[@]}" "${packages[@]}" || failed_install
  else
    installer=pip
    usable_venv && .venv/bin/python -m pip --version >/dev/null 2>&1 || logged "$python" -m venv --clear .venv || failed_install
    # pip would leave what an interrupted unpacking wrote, as no list of those files exists.
    installed || rm -rf .venv/lib/python3.*/site-packages/torch .venv/lib/python3.*/site-packages/torch-*.dist-info
    logged .venv/bin/python -m pip install --disable-pip-version-check "${flags[@]}" "${packages[@]}" || failed_install
  fi
  link_venv
  serves .libtorch || fail "the LibTorch just installed cannot be used: $(problem_of .libtorch)" \
    "remove .venv and run this again; the log is $log"
}

# Whether ./.venv has a Python that runs and that PyPI has LibTorch for.
usable_venv() {
  .venv/bin/python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

link_venv() {
  local torch
  torch=$(compgen -G '.venv/lib/python3.*/site-packages/torch' | head -n 1) || torch=.venv/torch-is-missing
  ln -sfn "$torch" .libtorch
}

failed_install() {
  local why hint
  explain
  fail "LibTorch was not installed: $why (log: $log)" "$hint"
}

# Links .libtorch to the folder that the user exported.
adopt() {
  local problem
  problem=$(problem_of "$LIBTORCH")
  [ -z "$problem" ] || fail "LIBTORCH=$LIBTORCH cannot be used: $problem" \
    "point it at LibTorch $wanted, or unset it to have that installed here"
  [ "$mode" != cuda ] || has_cuda "$LIBTORCH" || fail "LIBTORCH=$LIBTORCH has no working CUDA" \
    "point it at LibTorch $wanted with CUDA, or unset it to have that installed here"
  links "$LIBTORCH/lib/libtorch_cpu.so" || fail "LIBTORCH=$LIBTORCH cannot be used: libraries that it needs are missing" \
    "\`ldd $LIBTORCH/lib/libtorch_cpu.so\` names them; or unset LIBTORCH to have one installed here"
  if [ -d .libtorch ] && [ ! -L .libtorch ]; then
    fail "LIBTORCH is set, and .libtorch is a folder of its own" "unset LIBTORCH, or move .libtorch away"
  fi
  ln -sfn "$LIBTORCH" .libtorch
}

mode=${1:-auto}
case "$mode" in
  cpu | cuda | auto) ;;
  -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; exit ;;
  *) fail "\`$mode\` is no kind of set-up" "scripts/setup_env.sh [cpu|cuda|auto]" ;;
esac
check_machine
check_tools

# Inside `cargo run`, LIBTORCH is .libtorch itself.
if [ -n "${LIBTORCH:-}" ]; then
  case "$LIBTORCH" in /*) ;; *) LIBTORCH=$started_in/$LIBTORCH ;; esac
fi
if [ -n "${LIBTORCH:-}" ] && [ ! "$LIBTORCH" -ef .libtorch ]; then
  adopt
elif ! ready; then
  if [ -d .libtorch ] && [ ! -L .libtorch ]; then
    fail ".libtorch cannot be used: $(problem_of .libtorch)" "move it away to have LibTorch $wanted installed in .venv"
  fi
  if [ "$mode" = auto ]; then if has_gpu; then mode=cuda; else mode=cpu; fi; fi
  mkdir -p target
  # Of two set-ups at once, the second waits, and finds the work done.
  exec 9>target/.setup_env.lock
  if command -v flock >/dev/null; then flock 9; fi
  if installed; then link_venv; fi
  if ! ready; then
    check_python
    install
  fi
fi
# A disk that fills up while linking says so in pages. A first build with tests and checks takes 2.8 GB.
if [ ! -d "${CARGO_TARGET_DIR:-target}/debug" ]; then check_disk . 3500 "the first build"; fi
say "LibTorch $wanted is ready: $(cd .libtorch && pwd -P)"
