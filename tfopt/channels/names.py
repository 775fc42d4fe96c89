"""Names of layers as a report says them."""

from __future__ import annotations

from collections.abc import Sequence


def short(names: Sequence[str]) -> dict[str, str]:
    """Each name without the scopes that all of them begin with, and without the name of its op where that is alike."""
    paths = [name.split("/") for name in names]
    start = end = 0
    while paths and all(len(path) > start + 1 and path[start] == paths[0][start] for path in paths):
        start += 1
    if len(paths) > 1 and all(len(path) > start + 1 and path[-1] == paths[0][-1] for path in paths):
        end = 1
    return {name: "/".join(path[start : len(path) - end]) for name, path in zip(names, paths, strict=True)}
