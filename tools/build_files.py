"""Writes the BUILD files of the Python packages, with the dependencies that the imports say.

python tools/build_files.py          # writes them
python tools/build_files.py --check  # exit code 1 where one is out of date

One target a file: libraries, binaries for scripts, tests for *_test.py. The rules are Bazel's native ones.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("tfopt", "pipelines", "benchmarks", "tests")
SCRIPTS = ("pipelines", "benchmarks")  # a file of these that can be run is a binary
STANDARD_LIBRARY_TESTS = ("tests/stdlib_test.py",)  # run as they are; every other test is run by pytest
HEADER = "# Written by tools/build_files.py from what each file imports.\n"

_WORKER = re.compile(r'"((?:tfopt|pipelines|benchmarks|tests)(?:\.\w+)+):\w+"')  # what tfopt.child imports by name
_TEMPLATE = re.compile(r'"(\w+\.(?:j2|css|js))"')


def sources() -> list[Path]:
    """Every Python file of the packages, relative to the repository; what is cached in hidden folders is not ours."""
    files = (file.relative_to(REPO) for name in PACKAGES for file in (REPO / name).rglob("*.py"))
    return sorted(file for file in files if not any(part.startswith(".") for part in file.parts))


@functools.cache
def imported(file: Path) -> frozenset[Path]:
    """The files of this repository that one of them imports, wherever in it the import stands.

    Importing a file runs the __init__.py of its packages, so these count.
    """
    text = (REPO / file).read_text(encoding="utf-8")
    names = set(_WORKER.findall(text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    found = {package / "__init__.py" for package in file.parents if package != Path()} - {file}
    for name in names:
        path = Path(*name.split("."))
        found.update(candidate for candidate in (path.with_suffix(".py"), path / "__init__.py") if candidate != file)
    return frozenset(path for path in found if path.parts[0] in PACKAGES and (REPO / path).is_file())


@functools.cache
def needed(file: Path) -> frozenset[Path]:
    """Every file that one of them imports, directly or through others."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        new = imported(waiting.pop()) - found
        found |= new
        waiting += new
    return frozenset(found)


def cycle(file: Path) -> set[Path]:
    """The other files that a file and these import each other; Bazel allows no such cycle between targets."""
    members = {other for other in needed(file) if file in needed(other)} - {file}
    foreign = sorted(other.as_posix() for other in members if other.parent != file.parent)
    if foreign:
        raise SystemExit(f"{file} and {', '.join(foreign)} import each other across packages: move what they share")
    return members


def label(file: Path, package: Path) -> str:
    """The target of a file, as a BUILD file of `package` names it."""
    name = file.parent.name if file.name == "__init__.py" else file.stem
    return f":{name}" if file.parent == package else f"//{file.parent.as_posix()}:{name}"


def target(file: Path) -> str:
    """The rule of one file."""
    package, text = file.parent, (REPO / file).read_text(encoding="utf-8")
    together = cycle(file)
    deps = set(imported(file).union(*map(imported, together))) - together - {file}
    srcs, data, extra = sorted({member.name for member in together | {file}}), [], {}
    data += sorted({name for name in _TEMPLATE.findall(text) if (REPO / package / name).is_file()})
    rule = "py_library"
    if file.name.endswith("_test.py"):
        rule = "py_test"
        extra = {"size": "small"}
        if file.as_posix() not in STANDARD_LIBRARY_TESTS:
            srcs.append("//tools:run_pytest.py")
            extra = {"main": "//tools:run_pytest.py", "args": [file.as_posix()]}
            deps.add(Path("tests/conftest.py"))
            data.append("//:pyproject.toml")
        if "saved_models" in text or "digits" in text:
            data.append("//:saved_models")
    elif package.parts[0] in SCRIPTS and '__name__ == "__main__"' in text:
        rule = "py_binary"
    attributes: dict[str, str | list[str]] = {"name": label(file, package).lstrip(":"), "srcs": srcs, **extra}
    if data:
        attributes["data"] = data
    if deps:
        attributes["deps"] = sorted(label(dep, package) for dep in deps)
    if package.parts[0] == "tests" and rule == "py_library":
        attributes["testonly"] = "True"
    return (
        f"{rule}(\n" + "".join(f"    {key} = {_starlark(key, value)},\n" for key, value in attributes.items()) + ")\n"
    )


def _starlark(key: str, value: str | list[str]) -> str:
    """An attribute's value in the form that Bazel's formatter gives it."""
    if isinstance(value, str):
        return value if key == "testonly" else f'"{value}"'
    if len(value) == 1:
        return f'["{value[0]}"]'
    return "[\n" + "".join(f'        "{item}",\n' for item in value) + "    ]"


def build_files() -> dict[Path, str]:
    """What each package's BUILD file should hold, by path."""
    packages: dict[Path, list[Path]] = {}
    for file in sources():
        packages.setdefault(file.parent, []).append(file)
    return {
        REPO / package / "BUILD": HEADER
        + "\n".join(['package(default_visibility = ["//visibility:public"])\n', *map(target, files)])
        for package, files in packages.items()
    }


def main(argv: list[str]) -> int:
    """Write or check; returns the exit code."""
    wrong = []
    for path, text in build_files().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(path)
            if "--check" not in argv:
                path.write_text(text, encoding="utf-8")
    for path in wrong:
        state = "out of date: run python tools/build_files.py" if "--check" in argv else "written"
        print(f"{path.relative_to(REPO)}: {state}")
    return 1 if wrong and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
