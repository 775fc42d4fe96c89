"""Recipes: an ordered list of passes with their options, as data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt.errors import TfoptError

_LOSSLESS: list[str | dict[str, Any]] = [
    "prune_graph",
    "merge_duplicates",
    "fold_constants",
    "prune_graph",
    "fold_shapes",
    "dense_lookups",
    "fold_affine",
    "fold_constants",
    "prune_graph",
    "merge_duplicates",
]

# In the form of the JSON files: passes, and the TFLite files that the recipe is for.
NAMED: dict[str, dict[str, Any]] = {
    "none": {"passes": []},
    "lossless": {"passes": _LOSSLESS},
    "device_float16": {"passes": _LOSSLESS, "tflite": ["float16"]},
    "device_int8": {"passes": [*_LOSSLESS, "quantize"], "tflite": ["int8"]},
    "device_int4": {"passes": [*_LOSSLESS, {"pass": "quantize", "bits": 4}], "tflite": ["int4"]},
    "device_mixed": {"passes": [*_LOSSLESS, "mixed_precision"], "tflite": ["mixed"]},
    "qat_int8": {"passes": [*_LOSSLESS, "train_quantized"], "tflite": ["int8"]},
    "qat_int4": {
        "passes": [*_LOSSLESS, {"pass": "train_quantized", "bits": 4, "learning_rate": 3e-4}],
        "tflite": ["int4"],
    },
    "prune80": {"passes": [*_LOSSLESS, {"pass": "prune_magnitude", "sparsity": 0.8}, "quantize"]},
    "prune_2_4": {"passes": [*_LOSSLESS, {"pass": "prune_magnitude", "pattern": "2:4"}, "quantize"]},
    "slim50": {"passes": [*_LOSSLESS, {"pass": "prune_channels", "share": 0.5}, "quantize"]},
    "cluster16": {"passes": [*_LOSSLESS, {"pass": "cluster", "clusters": 16}, "quantize"]},
    "low_rank": {"passes": [*_LOSSLESS, {"pass": "low_rank", "rank": "flops"}, "quantize"]},
    "deep_compression": {
        "passes": [*_LOSSLESS, {"pass": "prune_magnitude", "sparsity": 0.9}, "cluster", "train_quantized"],
        "tflite": ["int8"],
    },
    "device_smallest": {
        "passes": [
            *_LOSSLESS,
            "prune_channels",
            {"pass": "prune_magnitude", "sparsity": 0.7},
            {"pass": "cluster", "clusters": 32},
            "train_quantized",
        ],
        "tflite": ["int8"],
    },
    "serving_bf16": {"passes": [*_LOSSLESS, "bfloat16"], "tflite": []},
    "serving_int8_weights": {"passes": [*_LOSSLESS, "int8_weights"], "tflite": []},
    "compact_signature": {
        "passes": [
            *_LOSSLESS,
            "compact_signature",
            *_LOSSLESS,
            "client_lookups",
            "broadcast_inputs",
            "narrow_inputs",
            "pack_inputs",
            "fold_constants",
            "prune_graph",
            "merge_duplicates",
        ],
        "tflite": [],
    },
    "binary": {"passes": [*_LOSSLESS, "binarize"], "tflite": []},
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
      name: for the report.
      steps: (pass name, options that differ from the pass's defaults), in order.
      tflite: the TFLite files that it is for; None leaves them to the data and the model.
    """

    name: str
    steps: tuple[tuple[str, dict[str, Any]], ...]
    tflite: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form in which recipes are written as JSON."""
        files = {} if self.tflite is None else {"tflite": list(self.tflite)}
        return {"name": self.name, "passes": [{"pass": name, **options} for name, options in self.steps], **files}


def read(source: str) -> Recipe:
    """Reads a recipe, and checks that every pass exists, has the options given, and stands where it may.

    Args:
      source: the name of one that ships with tfopt, a JSON file, or the JSON itself: `{"name": ..., "passes":
        ["prune_graph", {"pass": "fold_constants", "max_growth_bytes": 0}], "tflite": ["int8"]}`, or just the list of
        passes.

    Raises:
      TfoptError: one line that names the recipe, the pass and what is wrong.
    """
    if source in NAMED:
        return parse(NAMED[source]["passes"], source, NAMED[source].get("tflite"))
    path = None if source.lstrip().startswith(("[", "{")) else Path(source)
    if path is not None and path.suffix != ".json":
        raise TfoptError(f"unknown recipe {source!r}: choose from {', '.join(NAMED)}, or give a .json file, or JSON")
    try:
        data = json.loads(source if path is None else path.read_text())
    except OSError as error:
        raise TfoptError(f"recipe {source}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TfoptError(f"recipe {source}: is not JSON: {error}") from error
    if isinstance(data, list):
        data = {"passes": data}
    known = {"name", "passes", "tflite"}
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list) or set(data) - known:
        raise TfoptError(f"recipe {source}: expected a list of passes, or an object with 'name' and 'passes'")
    files = data.get("tflite")
    if files is not None and not (isinstance(files, list) and all(isinstance(name, str) for name in files)):
        raise TfoptError(f"recipe {source}: 'tflite' must be a list of names, received {files!r}")
    return parse(data["passes"], str(data.get("name", path.stem if path else "custom")), files)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Changes options of a recipe.

    Args:
      recipe: stays as it is.
      settings: "pass.option=value" each; a pass that stands in the recipe several times is changed everywhere.

    Raises:
      TfoptError: a pass that the recipe does not have, an option that the pass does not have, a value of another type.
    """
    from tfopt import passes

    steps = [{"pass": name, **options} for name, options in recipe.steps]
    for setting in settings:
        target, _, text = setting.partition("=")
        name, _, option = target.partition(".")
        if not text or not option:
            raise TfoptError(f"--set={setting}: expected pass.option=value, such as prune_magnitude.sparsity=0.9")
        chosen = [step for step in steps if step["pass"] == name]
        if not chosen:
            has = ", ".join(dict.fromkeys(step["pass"] for step in steps)) or "none"
            raise TfoptError(f"--set={setting}: recipe {recipe.name} has no pass {name!r}; its passes: {has}")
        default = passes.get(name).options.get(option)
        try:
            value = text if default is None or isinstance(default, str) else json.loads(text)
        except ValueError:
            value = text  # of the wrong type, which parse says
        for step in chosen:
            step[option] = value
    return parse(list(steps), recipe.name, None if recipe.tflite is None else list(recipe.tflite))


def parse(steps: list[str | dict[str, Any]], name: str, tflite: list[str] | None = None) -> Recipe:
    """Checks the steps of a recipe; see `read`."""
    from tfopt import passes  # TensorFlow is loaded here, not when flags are read

    checked: list[tuple[str, dict[str, Any]]] = []
    makers: dict[str, tuple[str, int]] = {}  # what must survive -> the pass that made it, and its position
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
            kinds = (int, float) if isinstance(default, float) else type(default)
            if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, kinds):
                raise TfoptError(
                    f"{where}: option {option!r} of {chosen.name} is {type(default).__name__}, received {value!r}"
                )
        earlier = [done for done, _ in checked]
        for needed in chosen.needs:
            if needed not in earlier:
                raise TfoptError(f"{where}: {chosen.name} needs {needed} before it; insert {needed!r} earlier")
        learned = [(i, done) for i, done in enumerate(earlier, 1) if passes.get(done).learns]
        if options.get("student") and learned:
            at, done = learned[0]
            raise TfoptError(
                f"{where}: {chosen.name} with a student would replace what {done} (pass {at}) made; put it earlier"
            )
        changed = [(i, done) for i, done in enumerate(earlier, 1) if passes.get(done).requests]
        if chosen.learns and not chosen.requests and changed:
            at, done = changed[0]
            raise TfoptError(
                f"{where}: {chosen.name} learns from rows as the original model takes them, and {done} (pass {at}) "
                f"changes the inputs; put {chosen.name} before {done}"
            )
        for made, (maker, at) in makers.items():
            if made not in chosen.keeps:
                raise TfoptError(
                    f"{where}: {chosen.name} would undo the {made} that {maker} (pass {at}) made; put {chosen.name} "
                    f"before {maker}"
                )
        makers |= dict.fromkeys(chosen.makes, (chosen.name, position))
        checked.append((chosen.name, options))
    return Recipe(name, tuple(checked), None if tflite is None else tuple(tflite))
