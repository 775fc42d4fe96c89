"""Recipes: an ordered list of passes with their options, as data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tfopt.errors import TfoptError

NAMED: dict[str, list[str | dict[str, Any]]] = {
    "none": [],
    "lossless": [
        "prune_graph",
        "merge_duplicates",
        "fold_constants",
        "prune_graph",
        "fold_shapes",
        "fold_affine",
        "fold_constants",
        "prune_graph",
        "merge_duplicates",
    ],
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
      name: for the report.
      steps: (pass name, options that differ from the pass's defaults), in order.
    """

    name: str
    steps: tuple[tuple[str, dict[str, Any]], ...]

    def to_dict(self) -> dict[str, Any]:
        """The form in which recipes are written as JSON."""
        return {"name": self.name, "passes": [{"pass": name, **options} for name, options in self.steps]}


def read(source: str) -> Recipe:
    """Reads a recipe, and checks that every pass exists, has the options given, and stands where it may.

    Args:
      source: the name of one that ships with tfopt, or a JSON file: `{"name": ..., "passes": ["prune_graph",
        {"pass": "fold_constants", "max_growth_bytes": 0}]}`, or just the list.

    Raises:
      TfoptError: one line that names the recipe, the pass and what is wrong.
    """
    if source in NAMED:
        return parse(NAMED[source], source)
    path = Path(source)
    if path.suffix != ".json":
        raise TfoptError(f"unknown recipe {source!r}: choose from {', '.join(NAMED)}, or give a .json file")
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise TfoptError(f"recipe {source}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TfoptError(f"recipe {source}: is not JSON: {error}") from error
    if isinstance(data, list):
        data = {"passes": data}
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list) or set(data) - {"name", "passes"}:
        raise TfoptError(f"recipe {source}: expected a list of passes, or an object with 'name' and 'passes'")
    return parse(data["passes"], str(data.get("name", path.stem)))


def parse(steps: list[str | dict[str, Any]], name: str) -> Recipe:
    """Checks the steps of a recipe; see `read`."""
    from tfopt import passes  # TensorFlow is loaded here, not when flags are read

    checked: list[tuple[str, dict[str, Any]]] = []
    for position, step in enumerate(steps, 1):
        where = f"recipe {name}, pass {position}"
        options = {"pass": step} if isinstance(step, str) else dict(step) if isinstance(step, dict) else {}
        if not isinstance(options.get("pass"), str):
            raise TfoptError(f"{where}: expected a pass name, or an object with 'pass', received {step!r}")
        chosen = passes.get(options.pop("pass"))
        for option, value in options.items():
            if option not in chosen.options:
                known = ", ".join(chosen.options) or "none"
                raise TfoptError(f"{where}: {chosen.name} has no option {option!r}; its options: {known}")
            default = chosen.options[option]
            if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, type(default)):
                raise TfoptError(
                    f"{where}: option {option!r} of {chosen.name} is {type(default).__name__}, received {value!r}"
                )
        earlier = [done for done, _ in checked]
        for needed in chosen.needs:
            if needed not in earlier:
                raise TfoptError(f"{where}: {chosen.name} needs {needed} before it; insert {needed!r} earlier")
        checked.append((chosen.name, options))
    return Recipe(name, tuple(checked))
