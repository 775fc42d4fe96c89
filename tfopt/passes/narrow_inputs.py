"""narrow_inputs: has the numbers of a request sent in fewer bytes each.

    ids: int64 to the least of uint8, int16 (or uint16), int32
    floats: float32 to float16, bfloat16, or uint8 * scale + offset

The graph casts them back right behind the input, so that nothing else changes. What the fewer bytes cannot hold the
client refuses; nothing wraps around. Ids lose nothing; what floats lose on the rows given is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt.errors import TfoptError
from tfopt.graph import infer_shapes
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Data, Pass
from tfopt.rewrite import Log, Refused
from tfopt.serving import request
from tfopt.serving.inputs import describe_bytes, groups, matches, placeholders
from tfopt.serving.number_ranges import byte_range
from tfopt.serving.vocabulary_bound import vocabulary_bound

_RULE = "input narrowed"
_INTEGERS = ("auto", "keep")
_FLOATS = ("float32", "float16", "bfloat16", "uint8")
# The REST interface of TensorFlow Serving makes no tensors of uint16, float16 and bfloat16; gRPC takes all of them.
_IDS = {True: (tf.uint8, tf.int16, tf.int32), False: (tf.uint8, tf.uint16, tf.int32)}
_NOT_REST = ("uint16", "float16", "bfloat16")


def run(
    model: Model,
    log: Log,
    data: Data,
    integers: str = "auto",
    floats: str = "float32",
    inputs: str = "*",
    rest: bool = True,
) -> None:
    """Narrows inputs, in place.

    Args:
      model: the model.
      log: gets what became of each input, and the bytes of a row before and after.
      data: rows, where there are any, show how large numbers get; "uint8" needs them.
      integers: "auto", or "keep" to leave them as they are.
      floats: "float32" leaves them as they are; "float16", "bfloat16", "uint8".
      inputs: globs of the names of inputs, separated by commas.
      rest: whether integers become only what the REST interface of TensorFlow Serving takes: int16, not uint16.

    Raises:
      TfoptError: an option out of its range, a name that fits no input, or no rows for "uint8".
    """
    for option, value, known in (("integers", integers, _INTEGERS), ("floats", floats, _FLOATS)):
        if value not in known:
            raise TfoptError(f"narrow_inputs: {option}={value!r}: choose from {', '.join(known)}")
    if floats == "uint8":
        data.need_rows("narrow_inputs with floats=uint8")
    globs = [glob.strip() for glob in inputs.split(",") if glob.strip()]
    present = {name for signature in model.signatures.values() for name in signature.inputs}
    for glob in globs:
        if glob != "*" and not any(matches(name, [glob]) for name in present):
            listed = ", ".join(sorted(present))
            raise TfoptError(f"narrow_inputs: inputs={glob!r} fits no input; the inputs are {listed}")
    before = model.copy()
    shapes = infer_shapes(model.graph, model.library())
    seen = _rows(model, data)
    steps: dict[str, dict[str, dict[str, Any]]] = {}
    for names in groups(model):
        uses: dict[str, dict[str, str]] = {}
        for signature in names:
            for name, node in placeholders(model, signature).items():
                uses.setdefault(node, {})[signature] = name
        for node, own in uses.items():
            name = next(iter(own.values()))
            if not any(matches(used, globs) for used in own.values()):
                continue
            values = [array for signature, used in own.items() for array in seen.get(signature, {}).get(used, [])]
            narrow: Callable[..., dict[str, Any] | None] = _number(model, node, integers, floats)
            try:
                step = narrow(model, log, node, name, values, shapes, floats, rest)
            except Refused as reason:
                log.refused[_RULE, name] = str(reason)
                continue
            if step is not None:
                for signature, used in own.items():
                    steps.setdefault(signature, {})[used] = step
                log.applied[_RULE] += 1
    for signature, changed in steps.items():
        for name, step in changed.items():
            model.signatures[signature].inputs[name].dtype = tf.as_dtype(step["dtype"]).as_datatype_enum
        model.requests.setdefault(signature, []).append({"step": "narrow", "inputs": changed})
    if names := sorted({n for changed in steps.values() for n, step in changed.items() if step["dtype"] in _NOT_REST}):
        log.warnings.append(
            f"narrow_inputs: {', '.join(names)}: the REST interface of TensorFlow Serving does not take "
            f"{', '.join(_NOT_REST)}: send these requests over gRPC"
        )
    for names in groups(model):
        log.notes += [describe_bytes(model, before, name) for name in names if name in steps][:1]


def _rows(model: Model, data: Data) -> dict[str, dict[str, list[np.ndarray]]]:
    """Signature -> input -> what clients would send for the rows given, in one array or more."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    rows = data.rows or data.labelled
    for signature in model.signatures if rows is not None else ():
        if model.stands_for.get(signature, signature) != data.signature:
            continue
        own = found.setdefault(signature, {})

        def collect(arrays: dict[str, np.ndarray], own: dict[str, list[np.ndarray]] = own) -> dict[str, np.ndarray]:
            for name, array in arrays.items():
                own.setdefault(name, []).append(array)
            return {}

        assert rows is not None
        request.call(model.requests.get(signature, ()), collect, rows.inputs)
    return found


def _number(model: Model, node: str, integers: str, floats: str) -> Callable[..., dict[str, Any] | None]:
    """What is done to an input, by its dtype."""
    placeholder = model.graph.nodes[node]
    dtype = tf.as_dtype(placeholder.attr["dtype"].type)
    if placeholder.op == "Placeholder" and dtype in (tf.int64, tf.int32) and integers != "keep":
        return _ids
    if placeholder.op == "Placeholder" and dtype in (tf.float32, tf.float64) and floats != "float32":
        return _floats
    return lambda *_: None


def _ids(
    model: Model, log: Log, node: str, name: str, values: list[np.ndarray], shapes: dict, floats: str, rest: bool
) -> dict[str, Any] | None:
    """Integers become as short as the vocabulary, and what was seen, allow."""
    dtype = tf.as_dtype(model.graph.nodes[node].attr["dtype"].type)
    numbers = np.concatenate([array.reshape(-1) for array in values]) if values else np.empty(0, np.int64)
    least, most = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    bound = vocabulary_bound(model, node, shapes)
    if bound is None and not numbers.size:
        raise Refused("no vocabulary behind it, and no rows, say how large it may get")
    if bound is not None and bound.negative and not numbers.size:
        least = -bound.size
    kinds: tuple[tf.DType, ...] = (tf.int32,)
    seen = f"{least:,} to {most:,}"
    if bound is not None and (bound.sure or numbers.size):
        kinds, most = _IDS[rest], max(most, bound.size - 1)
    to = next((kind for kind in kinds if kind.min <= least and most <= kind.max), None)
    if to is None or to.size >= dtype.size:
        if to is None:
            raise Refused(f"its numbers go from {least:,} to {most:,}")
        return None
    if bound is None:
        why = f"no vocabulary is behind it, so this is proved for the rows given alone, {seen}"
    elif bound.sure:
        why = f"{bound.node} has {bound.size:,} rows"
        if bound.negative and to.min == 0:
            why += ", and the rows given have no negative number, which would count from the end"
    else:
        why = f"{bound.node} knows {bound.size:,}, and the rows given hold {seen if numbers.size else 'none'}"
    log.notes.append(f"{name}: {dtype.name} to {to.name}, exact: {why}")
    _restore(model, node, to, dtype, None)
    return {"dtype": to.name}


def _floats(
    model: Model, log: Log, node: str, name: str, values: list[np.ndarray], shapes: dict, floats: str, rest: bool
) -> dict[str, Any]:
    """Floats become shorter ones, or bytes with a scale and an offset."""
    dtype = tf.as_dtype(model.graph.nodes[node].attr["dtype"].type)
    to = tf.as_dtype(floats)
    flat = np.concatenate([array.reshape(-1) for array in values]) if values else np.empty(0, np.float32)
    if floats != "uint8":
        with np.errstate(over="ignore"):
            narrowed = flat.astype(to.as_numpy_dtype).astype(np.float64)
        if (np.isfinite(flat) & ~np.isfinite(narrowed)).any():
            raise Refused(f"{floats} cannot hold its largest number, {np.abs(flat[np.isfinite(flat)]).max():g}")
        _restore(model, node, to, dtype, None)
        log.notes.append(f"{name}: {dtype.name} to {floats}, {_error(flat, narrowed)}")
        return {"dtype": floats}
    if not flat.size:
        raise Refused("the rows given have no numbers for it: uint8 needs their range")
    if not np.isfinite(flat).all():
        raise Refused("the rows given have numbers in it that are not finite: uint8 cannot hold these")
    shape = shapes.get(node)
    columns = shape is not None and len(shape) == 2 and (shape[1] or 0) > 1
    rows = np.concatenate(values) if columns else flat
    found = byte_range(rows, columns)
    _restore(model, node, to, dtype, (found.scale, found.offset))
    how = f"scale {found.scale.min():g} to {found.scale.max():g}" if columns else f"scale {found.scale:g}"
    alike = ", which its numbers are multiples of: exact but for rounding" if found.exact else ""
    log.notes.append(f"{name}: {dtype.name} to uint8, {how}{alike}; {_error(rows, found.restored(rows))}")
    return {"dtype": "uint8", "scale": found.scale.tolist(), "offset": found.offset.tolist()}


def _error(values: np.ndarray, restored: np.ndarray) -> str:
    """What narrowing did to the rows given."""
    finite = np.isfinite(values)
    if not finite.any():
        return "its error was not measured: no rows were given"
    wide = values[finite].astype(np.float64)
    error = float(np.abs(wide - restored[finite].astype(np.float64)).max())
    return f"off by at most {error:.2g} on the rows given, which go from {wide.min():g} to {wide.max():g}"


def _restore(
    model: Model, node: str, to: tf.DType, dtype: tf.DType, affine: tuple[np.ndarray, np.ndarray] | None
) -> None:
    """Gives a Placeholder a new dtype, and has the old numbers computed right behind it."""
    graph = model.graph
    added = graph.add_op(f"{node}/{dtype.name}", "Cast", [node], SrcT=to, DstT=dtype, Truncate=False)
    ref = added
    if affine is not None:
        scale, offset = (each.astype(dtype.as_numpy_dtype) for each in affine)
        if (scale != 1).any():
            ref = graph.add_op(f"{node}/scaled", "Mul", [ref, graph.add_constant(f"{node}/scale", scale)], T=dtype)
        if offset.any():
            ref = graph.add_op(f"{node}/shifted", "AddV2", [ref, graph.add_constant(f"{node}/offset", offset)], T=dtype)
    graph.redirect(node, ref)
    graph.set_input(added, 0, node)
    graph.nodes[node].attr["dtype"].type = to.as_datatype_enum


PASS = Pass(
    "narrow_inputs",
    run,
    options={"integers": "auto", "floats": "float32", "inputs": "*", "rest": True},
    learns=True,
    keeps=INVARIANTS,
    lossy_with="floats",
    requests=True,
)
