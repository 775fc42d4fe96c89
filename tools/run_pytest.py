"""Runs pytest on the file that the first argument names: the main program of the test targets."""

import sys

import pytest

if __name__ == "__main__":
    # Files under Bazel's sandbox are read-only: no cache beside them.
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
