"""Answers to JSON, written as TensorFlow Serving writes it: numbers of the fewest digits, whole floats with `.0`."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from tfopt.serving.server.errors import invalid


def predictions(outputs: dict[str, np.ndarray], rows: bool) -> bytes:
    """The body of an answer to :predict.

    Args:
      outputs: array by output.
      rows: whether one object is wanted for each row (`predictions`), or one array for each output (`outputs`).

    Raises:
      ServingError: INVALID_ARGUMENT where the outputs have no common rows, or a dtype that JSON cannot hold.
    """
    if not rows:
        texts = {name: _nested(_tokens(name, array), array.shape) for name, array in sorted(outputs.items())}
        return (
            f'{{\n    "outputs": {_named(texts, "    ") if len(texts) > 1 else next(iter(texts.values()))}\n}}'.encode()
        )
    count = _common_rows(outputs)
    columns = {}
    for name, array in sorted(outputs.items()):
        tokens, size = _tokens(name, array), array.size // count
        columns[name] = [_nested(tokens[row * size : (row + 1) * size], array.shape[1:]) for row in range(count)]
    if len(columns) == 1:
        lines = next(iter(columns.values()))
    else:
        lines = [_named({name: texts[row] for name, texts in columns.items()}, "        ") for row in range(count)]
    return ('{\n    "predictions": [' + ", ".join(lines) + "\n    ]\n}").encode()


def classifications(result: Any) -> bytes:
    """The body of an answer to :classify, from a ClassificationResult."""
    rows = [
        "["
        + ", ".join(f"[{_string(c.label)}, {_floats(np.array([c.score], np.float32))[0]}]" for c in row.classes)
        + "]"
        for row in result.classifications
    ]
    return ('{\n    "results": [' + ", ".join(rows) + "\n    ]\n}").encode()


def regressions(result: Any) -> bytes:
    """The body of an answer to :regress, from a RegressionResult."""
    values = _floats(np.array([r.value for r in result.regressions], np.float32))
    return ('{\n    "results": [' + ", ".join(values) + "]\n}").encode()


def error(message: str) -> bytes:
    """The body of an answer that is an error."""
    return f'{{\n    "error": {_string(message)}\n}}'.encode()


def _common_rows(outputs: dict[str, np.ndarray]) -> int:
    rows = 0
    for name, array in sorted(outputs.items()):
        if not array.ndim:
            raise invalid(f"Tensor name: {name} has no shape information ")
        if not len(array):
            raise invalid(f"Tensor name: {name} has invalid batch size: 0")
        if rows not in (0, len(array)):
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {rows}")
        rows = len(array)
    return rows


def _named(texts: dict[str, str], indent: str) -> str:
    inner = f",\n{indent}    ".join(f"{_string(name)}: {text}" for name, text in texts.items())
    return f"{{\n{indent}    {inner}\n{indent}}}"


def _nested(tokens: list[str], shape: tuple[int, ...]) -> str:
    """Tokens of an array, in order, in the brackets of its shape."""
    if not shape:
        return tokens[0]
    for size in reversed(shape[1:]):
        count = len(tokens) // size if size else int(np.prod(shape[:-1]))
        tokens = ["[" + ", ".join(tokens[i * size : (i + 1) * size]) + "]" for i in range(count)]
    return "[" + ", ".join(tokens) + "]"


def _tokens(name: str, array: np.ndarray) -> list[str]:
    flat = array.ravel()
    kind = flat.dtype.kind
    if flat.dtype in (np.float32, np.float64):
        return _floats(flat)
    if kind == "b":
        return ["true" if value else "false" for value in flat.tolist()]
    if kind in "iu":
        return list(map(str, flat.tolist()))
    if kind == "O":
        if name.endswith("_bytes"):
            return [f'{{"b64": "{base64.b64encode(value).decode()}"}}' for value in flat.tolist()]
        return [_string(value.decode(errors="replace")) for value in flat.tolist()]
    raise invalid(f"Failed to write JSON value for tensor type: {flat.dtype.name}")


def _floats(flat: np.ndarray) -> list[str]:
    """Six digits where they give the number back, else as many as are sure to."""
    values = flat.tolist()
    texts = ("%.6g " * len(values) % tuple(values)).split()
    read = np.array(texts, np.float64).astype(flat.dtype)
    digits = "%.9g" if flat.dtype == np.float32 else "%.17g"
    for index in np.flatnonzero((read != flat) & np.isfinite(flat)).tolist():
        texts[index] = digits % values[index]
    if not np.isfinite(flat).all():
        names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
        texts = [names.get(text.replace("-nan", "nan"), text) for text in texts]
        return [text if text in names.values() else _decimal(text) for text in texts]
    return list(map(_decimal, texts))


def _decimal(text: str) -> str:
    return text if "." in text or "e" in text else text + ".0"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
