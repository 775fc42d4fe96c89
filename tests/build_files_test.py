from __future__ import annotations

import re

from tests.conftest import REPO
from tools import build_files


def test_build_files_say_what_the_imports_say():
    wrong = [
        path.relative_to(REPO).as_posix()
        for path, text in build_files.build_files().items()
        if not path.is_file() or path.read_text() != text
    ]
    assert wrong == [], "run: python tools/build_files.py"


def test_every_file_is_in_a_target():
    for package in ("tfopt", "pipelines"):
        for file in (REPO / package).rglob("*.py"):
            listed = re.findall(r'"([\w.]+\.py)"', (file.parent / "BUILD").read_text())
            assert file.name in listed, file


def test_dependencies_follow_lazy_imports_and_workers():
    text = (REPO / "tfopt" / "BUILD").read_text()
    rule = next(rule for rule in text.split("py_library(") if '"keras_file.py"' in rule)
    assert '":child"' in rule and '":errors"' in rule
    assert '":keras_file"' in next(rule for rule in text.split("py_library(") if '"sources.py"' in rule)
