#!/usr/bin/env bash
# Builds every library and script with the Bazel on the PATH, and runs one test that needs no installed package.
# Installs nothing. Usage: [PYTHON=.venv/bin/python] tools/check_build.sh [--allow-missing] [TEST-TARGET...]
#   --allow-missing  where there is no Bazel, say so and end with exit code 0 in place of 3
#   TEST-TARGET      run these; those that pytest runs need a PYTHON that has the packages
set -euo pipefail
cd "$(dirname "$0")/.."

allow_missing=false
if [ "${1:-}" = "--allow-missing" ]; then
  allow_missing=true
  shift
fi
if ! command -v bazel >/dev/null; then
  echo "check_build.sh: skipped, there is no bazel on the PATH (Debian: apt-get install bazel-bootstrap)" >&2
  $allow_missing && exit 0
  exit 3
fi

# Made anew each time, so that nothing below writes through a link that was left there.
work="$PWD/build/bazel"
rm -rf "$work"
mkdir -p "$work"

flags=(--symlink_prefix=/ --noshow_progress --color=no)
# Bazel 4 fetches these three repositories before it runs any test, Python ones too. What the Python rules use of them
# is little, and built in: stand-ins that hand it on make the build work without a network.
# Debian's build of 4.2 does not know its version.
if [[ "$(bazel --version)" == "bazel "@(4.*|no_version)* ]]; then
  mkdir -p "$work"/{rules_cc/cc,rules_java/java,remote_coverage_tools}
  touch "$work"/{rules_cc,rules_java,remote_coverage_tools}/WORKSPACE "$work"/{rules_cc/cc,rules_java/java}/BUILD
  for rule in cc_binary cc_import cc_library cc_proto_library cc_test cc_toolchain cc_toolchain_suite objc_library; do
    echo "$rule = native.$rule"
  done >"$work/rules_cc/cc/defs.bzl"
  for rule in binary import library plugin proto_library runtime test toolchain; do
    echo "java_$rule = native.java_$rule"
  done >"$work/rules_java/java/defs.bzl"
  echo 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])' \
    >"$work/remote_coverage_tools/BUILD"
  for repository in rules_cc rules_java remote_coverage_tools; do
    flags+=("--override_repository=$repository=$work/$repository")
  done
fi

# Bazel starts Python programs with `python`, a name that Debian alone does not have, and then looks for `python3`.
python=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
mkdir "$work/bin"
for name in python python3; do
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >"$work/bin/$name"
  chmod +x "$work/bin/$name"
done
flags+=("--test_env=PATH=$work/bin:$PATH")

bazel --max_idle_secs=60 build "${flags[@]}" //tfopt/... //pipelines/...
bazel --max_idle_secs=60 test "${flags[@]}" --test_output=errors "${@:-//tests:stdlib_test}"
