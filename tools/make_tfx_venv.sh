#!/usr/bin/env bash
# Makes the virtual environment of TFX and Beam: by plain pip where glibc has what the wheels of ml-metadata need, from
# the committed lock where it is older.
# Usage: PYTHON=python3.11 tools/make_tfx_venv.sh DIRECTORY
set -euo pipefail

venv=$1
python=${PYTHON:-python3.11}
here=$(dirname "$0")
lock=$here/tfx/py311-glibc2.36.lock

fail() {
  echo "make_tfx_venv.sh: $*" >&2
  exit 1
}

command -v c++ >/dev/null || command -v g++ >/dev/null ||
  fail "pyfarmhash, which TFX needs, comes as source: install a C++ compiler (Debian and Ubuntu: g++ python3-dev)"
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
[ -n "$glibc" ] || fail "TFX has wheels for Linux with glibc only"

if [ "$(printf '%s\n' 2.39 "$glibc" | sort -V | head -1)" = 2.39 ]; then
  exec "$here/make_venv.sh" "$venv" -e ".[tfx,beam]" -r "$here/tfx/requirements.in"
fi
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
  fail "with glibc $glibc, before 2.39, TFX runs from $lock, which is for Python 3.11. Received: $("$python" --version 2>&1)"
# Some of its packages are newer or older than others of it ask for, and run: pip is not to look into that.
"$here/make_venv.sh" "$venv" --no-deps -r "$lock"
"$here/make_venv.sh" "$venv" --no-deps -e .
