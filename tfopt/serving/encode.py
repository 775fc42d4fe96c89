"""What a client sends: the inputs of a compact signature, made from the features of its rows in steps that are data.

This file needs NumPy alone, and is copied whole into the `client.py` that goes beside a model, so that what a client
runs is what the equivalence of both signatures was proved with. Arrays of strings are object arrays of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Step = dict[str, Any]


def encode(steps: Sequence[Step], arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Makes the inputs of a signature.

    Args:
      steps: what to do, in order; each has the name of its kind under "step".
      arrays: input name -> array of rows, as the original signature takes them; columns of `columns` where that takes
        serialized examples.

    Returns:
      Input name -> array, as the compact signature takes them.

    Raises:
      ValueError: a value that the form cannot hold; one line that names the input, the row and the value.
    """
    arrays = dict(arrays)
    for step in steps:
        arrays = KINDS[step["step"]](step, arrays)
    return arrays


def columns(features: Mapping[str, Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> Arrays:
    """Gathers rows of features, as they stand in a tf.Example, into one array a feature.

    Args:
      features: name -> {"dtype", "shape", "default"}, as in the step "features".
      rows: of each, feature name -> value, or list of values; a feature may be missing, or None.

    Returns:
      Feature name -> array (rows, *shape); of a feature without a shape an object array of one list for each row, of
      a "list" one of such lists, step by step.

    Raises:
      ValueError: a feature without a default is missing, or has another number of values.
    """
    rows = list(rows)
    return {name: _column(name, feature, [row.get(name) for row in rows]) for name, feature in features.items()}


def _column(name: str, feature: Mapping[str, Any], values: list[Any]) -> np.ndarray:
    dtype = object if feature["dtype"] == "string" else np.dtype(feature["dtype"])
    if feature.get("list"):
        lists = np.empty(len(values), object)
        for row, value in enumerate(values):
            lists[row] = [_flat(each, dtype) for each in ([] if value is None else value)]
        return lists
    shape, default = feature["shape"], feature.get("default")
    if shape is None:
        column = np.empty(len(values), object)
        for row, value in enumerate(values):
            column[row] = _flat(value, dtype)
        return column
    if shape[:1] == [-1]:
        return _padded([_flat(value, dtype) for value in values], shape[1:], default, dtype)
    filled = np.empty((len(values), *shape), dtype)
    for row, value in enumerate(values):
        flat = _flat(value, dtype)
        if not flat.size and default is not None:
            filled[row] = _with_bytes(np.array(default, dtype))
        elif flat.size != filled[row : row + 1].size:
            raise ValueError(f"feature {name!r}, row {row}: wants {filled[0].size} values, received {flat.size}")
        else:
            filled[row] = flat.reshape(shape)
    return filled


def _flat(value: Any, dtype: Any) -> np.ndarray:
    if value is None:
        return np.empty(0, dtype)
    if isinstance(value, str | bytes):
        value = [value]
    return _with_bytes(np.asarray(value, dtype).reshape(-1))


def _with_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype != object:
        return array
    flat = [value.encode() if isinstance(value, str) else value for value in array.reshape(-1)]
    encoded = np.empty(len(flat), object)
    encoded[:] = flat
    return encoded.reshape(array.shape)


def _padded(values: list[np.ndarray], shape: list[int], default: Any, dtype: Any) -> np.ndarray:
    """Rows of different length, each filled up to the longest."""
    size = int(np.prod(shape, dtype=int))
    longest = max((len(value) // size for value in values), default=0)
    filled = np.full((len(values), longest, *shape), _fill(dtype) if default is None else default, dtype)
    filled = _with_bytes(filled)
    for row, value in enumerate(values):
        filled[row, : len(value) // size] = value.reshape(-1, *shape)
    return filled


def _fill(dtype: Any) -> Any:
    return b"" if np.dtype(dtype) == object else 0


def features(step: Step, arrays: Arrays) -> Arrays:
    """Serialized tf.Examples, or SequenceExamples, become columns; columns stay.

    The step holds "features" (see `columns`), "input", the name of the serialized examples, and whether the signature
    takes a "single" one, and hence no axis of rows.
    """
    wanted = step["features"]
    if step["input"] in arrays:
        arrays = columns(wanted, _parsed(np.asarray(arrays[step["input"]]).reshape(-1), wanted))
    if not step.get("single"):
        return {name: arrays[name] for name in wanted}
    if any(len(arrays[name]) != 1 for name in wanted):
        raise ValueError("the signature takes one row")
    return {name: arrays[name][0] for name in wanted}


def _parsed(records: np.ndarray, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    from tensorflow.core.example import example_pb2  # only here: clients may have no TensorFlow

    def value(feature: Any) -> Any:
        kind = feature.WhichOneof("kind")
        return getattr(feature, kind).value if kind else None

    if not any(feature.get("list") for feature in wanted.values()):
        parsed = [example_pb2.Example.FromString(record).features.feature for record in records]
        return [{name: value(row[name]) for name in wanted if name in row} for row in parsed]
    rows = []
    for record in records:
        example = example_pb2.SequenceExample.FromString(record)
        context, lists = example.context.feature, example.feature_lists.feature_list
        row = {name: value(context[name]) for name in wanted if name in context}
        rows.append(row | {name: [value(each) for each in lists[name].feature] for name in wanted if name in lists})
    return rows


def pad(step: Step, arrays: Arrays) -> Arrays:
    """A column of lists becomes values (rows, width), filled up, and a mask of what is there.

    The step holds "input", the name of the "mask", and perhaps the "width"; else that of the longest row.
    """
    rows = arrays[step["input"]]
    width = step.get("width", max(map(len, rows), default=0))
    lengths = np.array([len(values) for values in rows], int)
    if lengths.size and lengths.max() > width:
        row = int(lengths.argmax())
        raise ValueError(f"input {step['input']!r}, row {row}: takes {width} value, received {lengths[row]}")
    dtype = rows[0].dtype if len(rows) else object
    values = _padded(list(rows), [], None, dtype)
    if values.shape[1] < width:
        values = np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=_fill(dtype))
    return {**arrays, step["input"]: values, step["mask"]: np.arange(width) < lengths[:, None]}


def split(step: Step, arrays: Arrays) -> Arrays:
    """A column of lists becomes the values of all rows and, under "row_splits", where each row begins and ends."""
    rows = arrays[step["input"]]
    splits = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = np.concatenate(list(rows)) if len(rows) else np.empty(0, object)
    return {**arrays, step["input"]: values, step["row_splits"]: splits}


def once(step: Step, arrays: Arrays) -> Arrays:
    """Inputs that all rows have in common become one row.

    The step holds "inputs", their names.
    """
    sent = dict(arrays)
    for name in step["inputs"]:
        rows = arrays[name]
        if not len(rows):
            raise ValueError(f"input {name!r} is sent once for all rows: received none")
        differs = rows != rows[:1]
        if rows.dtype.kind == "f":
            differs &= ~(np.isnan(rows) & np.isnan(rows[:1]))
        if differs.any():
            row = int(np.argwhere(differs)[0][0])
            raise ValueError(f"input {name!r} is sent once for all rows, but row {row} differs from row 0")
        sent[name] = rows[:1]
    return sent


def narrow(step: Step, arrays: Arrays) -> Arrays:
    """Numbers become ones of fewer bytes; what these cannot hold is refused.

    The step holds "inputs": name -> {"dtype"}, and for floats that become integers "scale" and "offset", numbers or
    lists of one for each column: x is sent as round((x - offset) / scale).
    """
    return {**arrays, **{name: _narrowed(name, arrays[name], to) for name, to in step["inputs"].items()}}


def _narrowed(name: str, array: np.ndarray, to: Mapping[str, Any]) -> np.ndarray:
    if to["dtype"] == "bfloat16":
        from ml_dtypes import bfloat16 as dtype  # only here: NumPy has none of its own
    else:
        dtype = np.dtype(to["dtype"])
    if array.dtype == dtype:
        return array
    if np.dtype(dtype).kind in "iu":
        values, least, most = array, np.iinfo(dtype).min, np.iinfo(dtype).max
        if "scale" in to:
            values = np.rint((array.astype(np.float64) - np.array(to["offset"])) / np.array(to["scale"]))
        fits = (values >= least) & (values <= most)
        if not fits.all():
            where = tuple(int(i) for i in np.argwhere(~fits)[0])
            row = f", row {where[0]}" if where else ""
            raise ValueError(f"input {name!r}{row}: {array[where]} does not fit {dtype}, as which it is sent")
        return values.astype(dtype)
    with np.errstate(over="ignore"):
        narrowed = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(narrowed)
    if lost.any():
        where = tuple(int(i) for i in np.argwhere(lost)[0])
        row = f", row {where[0]}" if where else ""
        raise ValueError(f"input {name!r}{row}: {array[where]} does not fit {to['dtype']}, as which it is sent")
    return narrowed


def pack(step: Step, arrays: Arrays) -> Arrays:
    """Inputs of one dtype become the columns of one, (rows, columns).

    The step holds "from", their names in order, and "into", the name of what they become.
    """
    parts = [arrays[name] for name in step["from"]]
    counts = {name: len(part) for name, part in zip(step["from"], parts, strict=True)}
    if len(set(counts.values())) > 1:
        name = next(name for name, count in counts.items() if count != len(parts[0]))
        raise ValueError(f"input {name!r} has {counts[name]} rows, and {step['from'][0]!r} has {len(parts[0])}")
    packed = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return {step["into"]: packed, **{name: array for name, array in arrays.items() if name not in step["from"]}}


def lookup(step: Step, arrays: Arrays) -> Arrays:
    """Strings become the numbers of a "table", those that are not in it the "default", in "shape" for each row."""
    strings, table, default = arrays[step["input"]], step["table"], step["default"]
    texts = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in strings.reshape(-1)]
    numbers = np.array([table.get(text, default) for text in texts], step["dtype"])
    return {**arrays, step["input"]: numbers.reshape(len(strings), *step["shape"])}


def stack(step: Step, arrays: Arrays) -> Arrays:
    """A column of steps of one "shape" becomes values (rows, steps, *shape), filled up, and "lengths" (rows,)."""
    rows, shape = arrays[step["input"]], step["shape"]
    lengths = np.array([len(steps) for steps in rows], np.int64)
    dtype = next((each.dtype for steps in rows for each in steps), np.dtype(np.float32))
    values = np.full((len(rows), lengths.max(initial=0), *shape), _fill(dtype), dtype)
    for row, steps in enumerate(rows):
        for at, each in enumerate(steps):
            if each.size != values[row, at].size:
                raise ValueError(
                    f"input {step['input']!r}, row {row}, step {at}: wants {values[row, at].size} values, "
                    f"received {each.size}"
                )
            values[row, at] = each.reshape(shape)
    return {**arrays, step["input"]: values, step["lengths"]: lengths}


def pad_lists(step: Step, arrays: Arrays) -> Arrays:
    """A column of steps of any length becomes values (rows, steps, width), filled up, and a "mask" of what is there."""
    rows = arrays[step["input"]]
    longest = max((len(steps) for steps in rows), default=0)
    width = max((len(each) for steps in rows for each in steps), default=0)
    dtype = next((each.dtype for steps in rows for each in steps), np.dtype(np.float32))
    values = np.full((len(rows), longest, width), _fill(dtype), dtype)
    mask = np.zeros(values.shape, bool)
    for row, steps in enumerate(rows):
        for at, each in enumerate(steps):
            values[row, at, : len(each)] = each
            mask[row, at, : len(each)] = True
    return {**arrays, step["input"]: values, step["mask"]: mask}


def nest(step: Step, arrays: Arrays) -> Arrays:
    """A column of steps of any length becomes all values, the "outer" splits of rows, and the "inner" ones of steps."""
    rows = arrays[step["input"]]
    flat = [each for steps in rows for each in steps]
    values = np.concatenate(flat) if flat else np.empty(0, object)
    outer = np.cumsum([0, *map(len, rows)]).astype(step["dtype"])
    inner = np.cumsum([0, *map(len, flat)]).astype(step["dtype"])
    return {**arrays, step["input"]: values, step["outer"]: outer, step["inner"]: inner}


KINDS: dict[str, Callable[[Step, Arrays], Arrays]] = {
    f.__name__: f for f in (features, pad, split, stack, pad_lists, nest, lookup, once, narrow, pack)
}
