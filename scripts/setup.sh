#!/usr/bin/env bash
# Makes .venv from requirements.lock (hashes required) and installs Megido into it, editable.
# Runs in a fraction of a second when nothing changed. Usage: scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.installed
want=$(cat requirements.lock pyproject.toml scripts/setup.sh | sha256sum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$want" ]; then
    exit 0
fi

suitable() { "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 13))' >/dev/null 2>&1; }
python=""
for candidate in "${PYTHON:-}" python3.13 python3 "${HOME:-/nonexistent}"/.pyenv/versions/3.13*/bin/python; do
    if [ -n "$candidate" ] && suitable "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: Python 3.13 is needed and was not found on PATH or in ~/.pyenv/versions; install it or name it with PYTHON=…" >&2
    exit 1
fi

echo "setup: installing into .venv with $("$python" --version) (once; takes seconds to a minute)"
# .venv may belong to another interpreter; its site-packages are made again from the lock in any case.
suitable .venv/bin/python || rm -rf .venv
"$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 UV_COMPILE_BYTECODE=1 VIRTUAL_ENV="$PWD/.venv"
# Compiled once here: services start three times as fast, also where Python may not write bytecode by itself.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
locked_uv=$(mktemp)
trap 'rm -f "$locked_uv"' EXIT
awk '/^uv==/ {on=1} /^[^ ]/ && !/^uv==/ {on=0} on' requirements.lock >"$locked_uv"
if .venv/bin/python -m pip install -q --require-hashes -r "$locked_uv" && .venv/bin/uv pip sync -q --require-hashes requirements.lock; then
    :
else
    echo "setup: uv could not do it, trying plain pip (slower)" >&2
    .venv/bin/python -m pip install -q --require-hashes -r requirements.lock
fi
if [ -x .venv/bin/uv ]; then
    .venv/bin/uv pip install -q --no-deps --no-build-isolation -e .
else
    .venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
fi
echo "$want" >"$stamp"
