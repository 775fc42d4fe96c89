"""Dense inputs in the place of a feature with a varying number of values, and the nodes that make its tensors of them.

A parsed feature of variable length is a SparseTensor (indices, values, shape) or a RaggedTensor (values, splits). Of a
mask M (rows, width) over X, true where row r has a value in column c,

    indices = Where(M)    values = GatherNd(X, indices)    shape = [rows, max_r sum_c M_rc]
    splits = [0, cumsum_r sum_c M_rc]

and of row splits s, with c the position in the row: indices_k = (r_k, k - s_{r_k}), r_k = #{r > 0 : s_r <= k}.

A feature whose values all come to rest in columns of width 1 (tf.sparse.to_dense of one value a row, as TensorFlow
Transform fills in what is missing) needs none of this: it is a column X (rows, 1), and Select(M, f(X), default).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt.feature_spec import Feature
from tfopt.graph import Graph, join, split

# Element by element, so that values may be computed for rows that have none, and left aside afterwards.
ELEMENTWISE = (
    *("Identity", "Cast", "LookupTableFindV2", "LookupTableFind", "StringToHashBucketFast", "StringToHashBucket"),
    *("StringToHashBucketStrong", "AsString", "StringLower", "StringUpper", "StringStrip", "Select", "SelectV2"),
    *("Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr", "LogicalNot"),
    *("Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "Log", "Log1p", "Abs", "Neg", "FloorMod", "Sign"),
)


@dataclasses.dataclass(frozen=True)
class Form:
    """What stands in the place of a parsed feature.

    Attributes:
      inputs: input name -> (reference of its Placeholder, shape).
      feature: how a client gathers it (see `tfopt.serving.encode.columns`).
      step: what the client does next; None where the column is sent as it is.
    """

    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    feature: dict[str, Any]
    step: dict[str, Any] | None = None


def placeholder(graph: Graph, name: str, dtype: tf.DType, shape: tuple[int, ...]) -> str:
    """Adds an input; returns its reference."""
    hint = "".join(c if c.isascii() and (c.isalnum() or c in "_-./") else "_" for c in name).lstrip("_-/") or "input"
    return graph.add_op(hint, "Placeholder", (), dtype=dtype, shape=tuple(None if d < 0 else d for d in shape))


def column(graph: Graph, feature: Feature, parser: str) -> Form | None:
    """Replaces a sparse feature by a column of one value a row, where that is all that the model can take.

    Args:
      graph: edited in place.
      feature: a sparse one.
      parser: the parsing node.

    Returns:
      The form, with a mask where a default cannot stand for what is missing; None for other features.
    """
    indices, values, shape = (join(parser, feature.ports[part]) for part in ("indices", "values", "shape"))
    targets = [user for user, index in _uses(graph, indices) if (graph.nodes[user].op, index) == ("SparseToDense", 0)]
    if not targets or len(targets) != len(_uses(graph, indices)):
        return None
    if not all(_one_wide(graph, target, parser, feature) for target in targets):
        return None
    if not all(_takes_rows(graph, user) for user, _ in _uses(graph, shape)):
        return None
    reached = _elementwise_ends(graph, values, set(targets))
    if reached is None:
        return None
    defaults = [graph.constant(graph.nodes[target].input[3]) for target in targets]
    plain = not reached and all(d is not None and d.size == 1 and d == defaults[0] for d in defaults)
    x = placeholder(graph, feature.name, feature.dtype, (-1, 1))
    inputs = {feature.name: (x, (-1, 1))}
    described: dict[str, Any] = {"dtype": feature.dtype.name, "shape": None}
    step = None
    if plain:
        assert defaults[0] is not None
        value = defaults[0].reshape(()).item()
        described |= {"shape": [1], "default": [value.decode() if isinstance(value, bytes) else value]}
        for target in targets:
            graph.redirect(target, x)
    else:
        mask = placeholder(graph, f"{feature.name}_present", tf.bool, (-1, 1))
        inputs[f"{feature.name}_present"] = (mask, (-1, 1))
        step = {"step": "pad", "input": feature.name, "mask": f"{feature.name}_present", "width": 1}
        flat = _reshape(graph, x, [-1], feature.dtype)
        graph.redirect(values, flat)
        for target in targets:
            node = graph.nodes[target]
            dtype = tf.as_dtype(node.attr["T"].type)
            dense = _reshape(graph, node.input[2], [-1, 1], dtype)
            graph.redirect(target, graph.add_op(f"{target}/select", "SelectV2", [mask, dense, node.input[3]], T=dtype))
    graph.redirect(shape, graph.add_op(f"{x}/shape", "Shape", [x], T=feature.dtype, out_type=tf.int64))
    return Form(inputs, described, step)


def masked(graph: Graph, feature: Feature, parser: str) -> Form:
    """Replaces a sparse or ragged feature by values (rows, width), filled up, and a mask of the same shape."""
    dtype, mask_name = feature.dtype, f"{feature.name}_mask"
    x = placeholder(graph, feature.name, dtype, (-1, -1))
    mask = placeholder(graph, mask_name, tf.bool, (-1, -1))
    indices = graph.add_op(f"{x}/indices", "Where", [mask], T=tf.bool)
    values = graph.add_op(f"{x}/values", "GatherNd", [x, indices], Tparams=dtype, Tindices=tf.int64)
    ones = graph.add_op(f"{x}/ones", "Cast", [mask], SrcT=tf.bool, DstT=tf.int64)
    axis = graph.add_constant(f"{x}/axis", np.array(1, np.int32))
    lengths = graph.add_op(f"{x}/lengths", "Sum", [ones, axis], T=tf.int64, Tidx=tf.int32, keep_dims=False)
    _connect(graph, feature, parser, indices, values, lengths)
    step = {"step": "pad", "input": feature.name, "mask": mask_name}
    inputs = {feature.name: (x, (-1, -1)), mask_name: (mask, (-1, -1))}
    return Form(inputs, {"dtype": dtype.name, "shape": None}, step)


def of_one_example(graph: Graph, feature: Feature, parser: str) -> Form:
    """Replaces a sparse feature of a single example, whose tensors have no axis of rows, by its values."""
    x = placeholder(graph, feature.name, feature.dtype, (-1,))
    zero, one = (graph.add_constant(f"{x}/{v}", np.array(v, np.int64)) for v in (0, 1))
    count = graph.add_op(f"{x}/count", "Size", [x], T=feature.dtype, out_type=tf.int64)
    positions = graph.add_op(f"{x}/positions", "Range", [zero, count, one], Tidx=tf.int64)
    target = graph.add_constant(f"{x}/target", np.array([-1, 1], np.int32))
    indices = graph.add_op(f"{x}/indices", "Reshape", [positions, target], T=tf.int64, Tshape=tf.int32)
    shape = graph.add_op(f"{x}/shape", "Shape", [x], T=feature.dtype, out_type=tf.int64)
    for part, ref in {"indices": indices, "values": x, "shape": shape}.items():
        graph.redirect(join(parser, feature.ports[part]), ref)
    return Form({feature.name: (x, (-1,))}, {"dtype": feature.dtype.name, "shape": None})


def with_row_splits(graph: Graph, feature: Feature, parser: str) -> Form:
    """Replaces a sparse or ragged feature by the values of all rows, one after another, and where each row begins."""
    dtype, splits_name = feature.dtype, f"{feature.name}_row_splits"
    x = placeholder(graph, feature.name, dtype, (-1,))
    narrow = placeholder(graph, splits_name, tf.int32, (-1,))
    splits = graph.add_op(f"{x}/splits", "Cast", [narrow], SrcT=tf.int32, DstT=tf.int64)
    ends = _slice(graph, splits, 1, None)
    lengths = graph.add_op(f"{x}/lengths", "Sub", [ends, _slice(graph, splits, 0, -1)], T=tf.int64)
    zero, one = (graph.add_constant(f"{x}/{v}", np.array(v, np.int64)) for v in (0, 1))
    count = graph.add_op(f"{x}/count", "Size", [x], T=dtype, out_type=tf.int64)
    positions = graph.add_op(f"{x}/positions", "Range", [zero, count, one], Tidx=tf.int64)
    first = graph.add_constant(f"{x}/first", np.array(0, np.int32))
    sorted_ends, wanted = (
        graph.add_op(f"{x}/row", "ExpandDims", [ref, first], T=tf.int64, Tdim=tf.int32) for ref in (ends, positions)
    )
    found = graph.add_op(f"{x}/rows", "UpperBound", [sorted_ends, wanted], T=tf.int64, out_type=tf.int64)
    rows = _reshape(graph, found, [-1], tf.int64)
    starts = graph.add_op(
        f"{x}/starts", "GatherV2", [splits, rows, first], Tparams=tf.int64, Tindices=tf.int64, Taxis=tf.int32
    )
    columns = graph.add_op(f"{x}/columns", "Sub", [positions, starts], T=tf.int64)
    indices = graph.add_op(f"{x}/indices", "Pack", [rows, columns], T=tf.int64, N=2, axis=1)
    _connect(graph, feature, parser, indices, x, lengths)
    step = {"step": "split", "input": feature.name, "row_splits": splits_name}
    inputs = {feature.name: (x, (-1,)), splits_name: (narrow, (-1,))}
    return Form(inputs, {"dtype": dtype.name, "shape": None}, step)


def _connect(graph: Graph, feature: Feature, parser: str, indices: str, values: str, lengths: str) -> None:
    """Puts the new tensors where the parser's were; `lengths` (rows,) are the numbers of values."""
    graph.redirect(join(parser, feature.ports["values"]), values)
    hint = feature.name if feature.name in graph.nodes else split(values)[0]
    axis = graph.add_constant(f"{hint}/axis", np.array(0, np.int32))
    if feature.kind == "ragged":
        sums = graph.add_op(f"{hint}/sums", "Cumsum", [lengths, axis], T=tf.int64, Tidx=tf.int32)
        zero = graph.add_constant(f"{hint}/zero", np.zeros(1, np.int64))
        ref = graph.add_op(f"{hint}/all_splits", "ConcatV2", [zero, sums, axis], T=tf.int64, Tidx=tf.int32, N=2)
        if feature.splits_dtype == tf.int32:
            ref = graph.add_op(f"{hint}/int32_splits", "Cast", [ref], SrcT=tf.int64, DstT=tf.int32)
        graph.redirect(join(parser, feature.ports["splits"]), ref)
        return
    # A maximum over no rows would be the least int64.
    zero = graph.add_constant(f"{hint}/zero", np.zeros(1, np.int64))
    padded = graph.add_op(f"{hint}/with_zero", "ConcatV2", [lengths, zero, axis], T=tf.int64, Tidx=tf.int32, N=2)
    width = graph.add_op(f"{hint}/width", "Max", [padded, axis], T=tf.int64, Tidx=tf.int32, keep_dims=False)
    rows = graph.add_op(f"{hint}/row_count", "Size", [lengths], T=tf.int64, out_type=tf.int64)
    shape = graph.add_op(f"{hint}/dense_shape", "Pack", [rows, width], T=tf.int64, N=2, axis=0)
    graph.redirect(join(parser, feature.ports["indices"]), indices)
    graph.redirect(join(parser, feature.ports["shape"]), shape)


def _reshape(graph: Graph, ref: str, shape: list[int], dtype: tf.DType) -> str:
    target = graph.add_constant(f"{split(ref)[0]}/target", np.array(shape, np.int32))
    return graph.add_op(f"{split(ref)[0]}/reshape", "Reshape", [ref, target], T=dtype, Tshape=tf.int32)


def _slice(graph: Graph, ref: str, begin: int, end: int | None) -> str:
    hint = f"{split(ref)[0]}/slice"
    bounds = [np.array([value], np.int32) for value in (begin, end or 0, 1)]
    refs = [graph.add_constant(f"{hint}/{part}", b) for part, b in zip(("begin", "end", "step"), bounds, strict=True)]
    return graph.add_op(
        hint, "StridedSlice", [ref, *refs], T=tf.int64, Index=tf.int32, end_mask=1 if end is None else 0
    )


def _uses(graph: Graph, ref: str) -> list[tuple[str, int]]:
    """The nodes, with the input, that take a tensor, seen through Identity; a result is a use by ''."""
    found: list[tuple[str, int]] = []
    pending = [join(*split(ref))]
    while pending:
        current = pending.pop()
        name, port = split(current)
        found += [("", 0) for output in graph.outputs.values() if output == current]
        for user, index, used in graph.uses(name):
            if used == port and graph.nodes[user].op == "Identity":
                pending.append(user)
            elif used == port:
                found.append((user, index))
    return found


def _one_wide(graph: Graph, target: str, parser: str, feature: Feature) -> bool:
    """Whether a SparseToDense has the shape [rows, 1], the rows being those of the examples."""
    pack = graph.producer(graph.nodes[target].input[1])
    while pack.op in ("Identity", "Cast"):
        pack = graph.producer(pack.input[0])
    if pack.op != "Pack" or len(graph.data_inputs(pack)) != 2:
        return False
    width = graph.constant(pack.input[1])
    return width is not None and width == 1 and _is_row_count(graph, pack.input[0], parser)


def _is_row_count(graph: Graph, ref: str, parser: str) -> bool:
    node = graph.producer(ref)
    while node.op in ("Identity", "Cast"):
        ref = node.input[0]
        node = graph.producer(ref)
    if node.op != "StridedSlice" or not _is_first(graph, node.name):
        return False
    ref = node.input[0]
    while graph.producer(ref).op in ("Identity", "Cast"):
        ref = graph.producer(ref).input[0]
    return split(ref)[0] == parser or graph.producer(ref).op == "Shape"


def _takes_rows(graph: Graph, user: str) -> bool:
    """Whether a node takes of a shape nothing but the number of rows."""
    if not user:
        return False
    if graph.nodes[user].op == "Cast":
        return all(_takes_rows(graph, each) for each, _ in _uses(graph, user))
    return graph.nodes[user].op == "StridedSlice" and _is_first(graph, user)


def _is_first(graph: Graph, name: str) -> bool:
    """Whether a StridedSlice takes the element 0."""
    node = graph.nodes[name]
    begin, end = graph.constant(node.input[1]), graph.constant(node.input[2])
    if begin is None or end is None or begin.shape != (1,) or begin[0] != 0:
        return False
    return bool(node.attr["shrink_axis_mask"].i & 1) or (end[0] == 1 and not node.attr["end_mask"].i)


def _elementwise_ends(graph: Graph, values: str, targets: set[str]) -> bool | None:
    """Whether something is computed between values and SparseToDense; None where they go elsewhere too."""
    computed, pending, seen = False, [values], set()
    while pending:
        ref = pending.pop()
        for user, index in _uses(graph, ref):
            if user in targets and index == 2:
                continue
            node = graph.nodes.get(user)
            if node is None or node.op not in ELEMENTWISE:
                return None
            computed = True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    for name in seen:  # what joins must be one value for all, or belong to the same rows
        for ref in graph.data_inputs(graph.nodes[name]):
            if not _joins(graph, ref, seen, values):
                return None
    return computed


def _joins(graph: Graph, ref: str, seen: set[str], values: str) -> bool:
    while graph.producer(ref).op == "Identity" and split(ref)[0] not in seen:
        if join(*split(ref)) == values:
            return True
        ref = graph.producer(ref).input[0]
    if split(ref)[0] in seen or join(*split(ref)) == values:
        return True
    constant = graph.constant(ref)
    scalar = constant is not None and constant.size == 1
    return scalar or graph.producer(ref).op.startswith(("HashTable", "MutableHashTable", "LookupTableSize"))
