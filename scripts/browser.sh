#!/usr/bin/env bash
# Finds a Chromium for the browser tests, or installs Debian's when it may. Prints nothing when one is there.
set -u
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "browser: installing chromium (once)"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } >/dev/null 2>&1
    command -v chromium >/dev/null 2>&1 && exit 0
fi
echo "browser: no Chromium on PATH and none could be installed; the browser tests need one (apt-get install chromium)" >&2
exit 1
