#!/usr/bin/env bash
# Sets up what the tests of HTML reports need, and nothing else does: playwright-core in ./.browser and, where it is missing and
# this user may install it, Chromium from Debian. Prints the folder; what it does goes to stderr.
#
# Usage: ATTN_TEST_BROWSER=$(scripts/setup_browser.sh) scripts/test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
package=playwright-core@1.65.1

fail() {
  echo "error: $1" >&2
  exit 1
}

command -v node >/dev/null && command -v npm >/dev/null || fail "the tests of reports need node and npm"

if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || fail "there is no Chromium on the PATH, and this user cannot install it with apt-get"
  echo "browser: installing chromium" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >&2 \
    || fail "apt-get cannot install chromium"
fi

# The last file written: a set-up that was broken off is done again.
ready=.browser/ready
if [ "$(cat "$ready" 2>/dev/null)" != "$package" ]; then
  echo "browser: downloading $package" >&2
  rm -rf .browser
  mkdir .browser
  echo '{ "private": true }' > .browser/package.json
  npm install --prefix .browser --no-audit --no-fund --ignore-scripts --loglevel=error "$package" >&2 || fail "npm cannot install $package"
  echo "$package" > "$ready"
fi
echo "$PWD/.browser"
