"""The child's side of tflite.py: each task makes or examines one file, and may abort without harm to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tfopt import runtime
from tfopt.errors import TfoptError
from tfopt.export import tflite_aliases


def worker() -> Callable[[dict[str, Any]], Any]:
    """Returns the function that answers requests: a dict with `task` and the task's own fields (see tflite.py)."""
    tasks = {
        "signatures": _signatures,
        "alias": _alias,
        "convert": _convert,
        "quantize": _quantize,
        "examine": _examine,
    }

    def answer(job: dict[str, Any]) -> Any:
        try:
            return tasks[job["task"]](job)
        except TfoptError as error:
            folder = str(Path(job["path"]).parent) if "path" in job else ""
            raise TfoptError(str(error).replace(f"{folder}/", "")) from error
        except Exception as error:
            if "Flex delegate" in str(error):
                raise TfoptError("calibration needs the Flex delegate (Select TF ops), which is not here") from error
            raise TfoptError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    return answer


def _signatures(job: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns the input names of each signature that is to be converted, and the aliases of these."""
    aliases = tflite_aliases.find(job["saved_model"])
    with runtime.open(job["saved_model"]) as program:
        found = {key: sorted(each.inputs) for key, each in program.signatures.items() if key not in aliases}
    return found, aliases


def _alias(job: Mapping[str, Any]) -> None:
    tflite_aliases.add(job["path"], job["aliases"])


# Imported where they are needed: each brings in a large library.
def _convert(job: Mapping[str, Any]) -> list[str]:
    from tfopt.export.tflite_converter import convert

    return convert(job)


def _quantize(job: Mapping[str, Any]) -> list[str]:
    from tfopt.export.tflite_quantizer import quantize

    return quantize(job)


def _examine(job: Mapping[str, Any]) -> dict[str, Any]:
    from tfopt.export.tflite_examine import examine

    return examine(job)
