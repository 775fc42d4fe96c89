"""Version directories: `<base>/<number>`, and which of them a model's version policy wants."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


def found(base: Path) -> dict[int, Path]:
    """Version directories by number, lowest first; `00000123` is version 123. Empty where there is no such folder."""
    versions: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for path in sorted(base.iterdir()):
            if path.name.isascii() and path.name.isdigit() and path.is_dir():
                versions[int(path.name)] = path
    return dict(sorted(versions.items()))


def aspired(config: Any) -> dict[int, Path]:
    """The versions that a ModelConfig wants served: the latest one where it has no policy."""
    versions = found(Path(config.base_path))
    policy = config.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return versions
    if kind == "specific":
        return {number: path for number, path in versions.items() if number in set(policy.specific.versions)}
    wanted = (policy.latest.num_versions or 1) if kind == "latest" else 1
    return dict(sorted(versions.items())[-wanted:])


def stamp(path: Path) -> tuple:
    """Changes when a version's files do: names, sizes and times of what lies in the directory."""
    files = []
    with contextlib.suppress(OSError):
        for file in sorted(path.rglob("*")):
            status = file.stat()
            files.append((file.name, status.st_size, status.st_mtime_ns))
    return tuple(files)
