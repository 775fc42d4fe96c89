"""Ops that take a shape, where a tensor has one row and the shape was computed for N.

    reshape(tile(x, N), [N, a, b]) = tile(reshape(x, [1, a, b]), N)

Shapes are followed in terms of the number of rows: an entry is a number, c times the number of rows, or not known.
Each function below says what the result of its node is (ONCE, BATCH, EXACT), having rewritten it where it is ONCE;
None where that cannot be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, join, make_node, split
from tfopt.passes.fold_shapes import Entries, evaluate
from tfopt.rules.constants import attr
from tfopt.serving.late_broadcast.ops import BATCH, EXACT, ONCE, einsum_labels

if TYPE_CHECKING:
    from tfopt.serving.late_broadcast.rewrite import LateBroadcast

# Stands for the number of rows in what is known of shapes: no dimension and no product of fixed ones is as large.
ROWS = 1 << 40

_LONGEST = 16  # no shape has more dimensions that anybody computes with
_INDEXING = ("GatherV2", "Slice", "StridedSlice")
_HAND_ON = ("Identity", "Cast", "Squeeze", "ExpandDims", "Reshape")
_SCALAR_TABLES = ("HashTableV2", "MutableHashTableV2")


def rows_of(entry: int | None) -> int | None:
    """c, where an entry of a shape is c N; None where it is something else."""
    return entry // ROWS if entry is not None and entry > 0 and entry % ROWS == 0 and entry // ROWS < 1 << 30 else None


def fixed(entry: int | None) -> int | None:
    """An entry of a shape that does not depend on the rows; None where it may."""
    return entry if entry is not None and -1 <= entry < 1 << 30 else None


def one_row(node: NodeDef) -> None:
    """Gives a Placeholder one row."""
    node.attr["shape"].shape.dim[0].size = 1


def with_lookups_of_known_shape(graph: Graph) -> Graph:
    """A copy for inferring shapes: TensorFlow does not know that a lookup in a table of scalars keeps the shape."""
    trial = graph.copy()
    for node in graph.nodes.values():
        if node.op == "LookupTableFindV2" and graph.producer(node.input[0]).op in _SCALAR_TABLES:
            kept = make_node(node.name, "Cast", [node.input[1], *(ref for ref in node.input if ref.startswith("^"))])
            kept.attr["SrcT"].type, kept.attr["DstT"].type = node.attr["Tin"].type, node.attr["Tout"].type
            trial.replace(kept)
    return trial


def _constant_input(run: LateBroadcast, node: NodeDef, index: int, values: Sequence[int]) -> None:
    """Puts a constant in the place of an input that may have been computed from the number of rows."""
    old = run.graph.constant(node.input[index])
    if old is not None and old.reshape(-1).tolist() == list(values):
        return
    dtype = run.dtype(node.input[index]).as_numpy_dtype
    ref = run.graph.add_constant(f"{node.name}/of_one_row", np.array(values, dtype))
    run.graph.set_input(node.name, index, ref)


def _shape_of(run: LateBroadcast, node: NodeDef) -> str | None:
    """Shape of one row becomes what it was: Shape(u) * [N, 1, ..]."""
    source = node.input[0]
    if run.splits.holds(source) or run.kind(source) != ONCE:
        return EXACT if not run.splits.holds(source) else None
    dims = run.shape(source)
    assert dims is not None
    out = tf.as_dtype(attr(node, "out_type").type or tf.int32.as_datatype_enum)
    inner = run.graph.add_op(f"{node.name}/one_row", "Shape", [source], T=run.type_of(source), out_type=out)
    times = run.rows.multiples(len(dims))
    if out != tf.int32:
        times = run.graph.add_op(f"{node.name}/times", "Cast", [times], SrcT=tf.int32, DstT=out)
    run.graph.replace(
        make_node(node.name, "Mul", [inner, times, *(ref for ref in node.input if ref.startswith("^"))], T=out)
    )
    run.symbols[node.name] = [None if dims[0] is None else dims[0] * ROWS, *dims[1:]]
    return EXACT


def _reshape(run: LateBroadcast, node: NodeDef) -> str | None:
    source, target = node.input[0], run.entries(node.input[1])
    kind = run.kind(source)
    if run.splits.holds(source):
        return None
    if target is None or not target:
        return None if kind == ONCE else EXACT
    lead, rest = rows_of(target[0]), [fixed(entry) for entry in target[1:]]
    shape = run.shape(source)
    if kind != ONCE:
        if lead == 1:
            return BATCH
        known = kind == BATCH and shape is not None and None not in shape[1:] and all(r and r > 0 for r in rest)
        same = known and math.prod(d or 0 for d in (shape or ())[1:]) == math.prod(r or 0 for r in rest)
        return BATCH if target[0] == -1 and same else EXACT
    if shape is None or None in shape or any(r is None or r == 0 or r < -1 for r in rest):
        return None
    size, open_ones = math.prod(d or 0 for d in shape), rest.count(-1)
    given = math.prod(r for r in rest if r is not None and r > 0)
    if target[0] == -1 and not open_ones and size and size % given == 0:
        _constant_input(run, node, 1, [-1, *[r or 0 for r in rest]])
        lead = size // given
    elif lead and open_ones <= 1 and size and size % (lead * given) == 0 and (open_ones or size == lead * given):
        _constant_input(run, node, 1, [lead, *[r or 0 for r in rest]])
    else:
        return None
    left = size // (lead * given)
    run.of_one[node.name] = (lead, *[left if r == -1 else r for r in rest])
    return ONCE


def _broadcast_to(run: LateBroadcast, node: NodeDef) -> str | None:
    source, target = node.input[0], run.entries(node.input[1])
    kind, shape = run.kind(source), run.shape(source)
    if run.splits.holds(source):
        return None
    lead = rows_of(target[0]) if target else None
    known = target is not None and all((fixed(entry) or 0) > 0 for entry in target[1:])
    if not lead or not known or shape is None:
        return None if kind == ONCE else EXACT
    assert target is not None
    if kind == BATCH:
        return BATCH if lead == 1 and len(shape) == len(target) else EXACT
    if kind == EXACT and (node.name in run.others or (len(shape) == len(target) and shape[0] != 1)):
        return EXACT
    if kind == ONCE and (len(shape) != len(target) or shape[0] != lead):
        return None
    run.of_one[node.name] = (lead, *target[1:])
    _constant_input(run, node, 1, [lead, *[entry or 0 for entry in target[1:]]])
    return ONCE


def _fill(run: LateBroadcast, node: NodeDef) -> str | None:
    target = run.entries(node.input[0])
    lead = rows_of(target[0]) if target else None
    if (
        not target
        or not lead
        or node.name in run.others
        or any(not fixed(entry) or entry == -1 for entry in target[1:])
    ):
        return EXACT
    run.of_one[node.name] = (lead, *target[1:])
    _constant_input(run, node, 0, [lead, *[entry or 0 for entry in target[1:]]])
    return ONCE


def _tile(run: LateBroadcast, node: NodeDef) -> str | None:
    source, times = node.input[0], run.entries(node.input[1])
    kind, shape = run.kind(source), run.shape(source)
    if run.splits.holds(source) or run.of_one.get(node.name) is None:
        return None
    if not times or any((fixed(entry) or 0) < 1 for entry in times[1:]):
        return None if kind == ONCE else EXACT
    lead = rows_of(times[0])
    if kind == EXACT and lead and shape and shape[0] == 1 and node.name not in run.others:
        _constant_input(run, node, 1, [lead, *[entry or 0 for entry in times[1:]]])
        return ONCE
    if kind == ONCE and times[0] == 1:
        _constant_input(run, node, 1, [entry or 0 for entry in times])
        return ONCE
    return None if kind == ONCE else BATCH if kind == BATCH and times[0] == 1 else EXACT


def _slice(run: LateBroadcast, node: NodeDef) -> str | None:
    source, begin, size = node.input[0], run.entries(node.input[1]), run.entries(node.input[2])
    kind = run.kind(source)
    if run.splits.holds(source) or run.of_one.get(node.name) is None:
        return None
    if not begin or not size or begin[0] != 0 or None in [fixed(entry) for entry in begin[1:] + size[1:]]:
        return None if kind == ONCE else EXACT
    rows = (run.shape(source) or (None,))[0] if kind == ONCE else 1
    if size[0] != -1 and (rows_of(size[0]) is None or rows_of(size[0]) != rows):
        return None if kind == ONCE else EXACT
    if kind == ONCE:
        _constant_input(run, node, 1, [entry or 0 for entry in begin])
        _constant_input(run, node, 2, [-1, *[entry or 0 for entry in size[1:]]])
    return kind


def drop_label(run: LateBroadcast, node: NodeDef, carried: Sequence[int]) -> None:
    """Einsum does not broadcast: an operand of one row loses its first axis."""
    operands, result = einsum_labels(node)
    for index in carried:
        ref = node.input[index]
        if run.kind(ref) == ONCE:
            shape = run.shape(ref)
            assert shape is not None
            target = run.graph.add_constant(
                f"{node.name}/shape", np.array([-1 if d is None else d for d in shape[1:]], np.int32)
            )
            row = run.add(
                f"{node.name}/row", "Reshape", [ref, target], EXACT, shape[1:], T=run.type_of(ref), Tshape=tf.int32
            )
            run.graph.set_input(node.name, index, row)
            operands[index] = operands[index][1:]
    node.attr["equation"].s = f"{','.join(operands)}->{result}".encode()


def note_entries(run: LateBroadcast, node: NodeDef) -> None:
    """Notes what is known of the small integer tensor that a node gives."""
    shape = run.shapes.get(node.name)
    if shape is None or len(shape) > 1 or None in shape or (shape and (shape[0] or 0) > _LONGEST):
        return
    refs = run.graph.data_inputs(node)
    if node.name in run.symbols or run.graph.constant(node.name) is not None:
        return
    if run.dtypes[node.name] not in (tf.int32, tf.int64):
        return
    found: Entries | None
    if node.op == "Shape":
        dims = run.shapes.get(join(*split(refs[0])))
        found = None if dims is None else [*([ROWS] if run.kind(refs[0]) == BATCH else dims[:1]), *dims[1:]]
    elif node.op in _HAND_ON:
        found = run.entries(refs[0])
    else:
        given = [run.entries(ref) for ref in refs]
        if node.op in _INDEXING and any(None in [fixed(e) for e in entries or [None]] for entries in given[1:]):
            return
        found = evaluate(node, given)
    if found is not None and len(found) == (shape[0] if shape else 1):
        run.symbols[node.name] = found


# By op; the input that may have one row comes first.
SHAPED: dict[str, Callable[[LateBroadcast, NodeDef], str | None]] = {
    **{"Shape": _shape_of, "Reshape": _reshape, "BroadcastTo": _broadcast_to},
    **{"Fill": _fill, "Tile": _tile, "Slice": _slice},
}
