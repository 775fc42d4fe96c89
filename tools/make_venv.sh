#!/usr/bin/env bash
# Makes a virtual environment and installs packages into it.
# Usage: PYTHON=python3.11 tools/make_venv.sh DIRECTORY PACKAGE-OR-PIP-OPTION...
set -euo pipefail

venv=$1
shift
python=${PYTHON:-python3.11}

fail() {
  echo "make_venv.sh: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "no $python on the PATH: install Python 3.11, or name one: make PYTHON=python3.12 ..."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
  fail "tfopt needs Python 3.11 to 3.13. Received: $("$python" --version 2>&1) ($python)"

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || {
    rm -rf "$venv"
    fail "$python could not make $venv (Debian and Ubuntu keep venv in a package of its own: python3.11-venv)"
  }
fi

echo "Installing into $venv (minutes the first time): $*"
# --quiet hides progress, and still shows warnings and errors.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" ||
  fail "pip could not install '$*' (its message is above). It needs a package index that it can reach:" \
    "check the network, a proxy (HTTPS_PROXY) or 'pip config list', and run the same command again."
