"""Columns of one tensor that a graph takes apart, and puts together again: what is done to each is done to all at once.

concat(f(x_0), f(x_1), ..) = f([x_0, x_1, ..])    f: elementwise, with a constant for each column
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, join, split
from tfopt.rules.constants import attr
from tfopt.serving.late_broadcast.ops import BINARY, ELEMENTWISE

_CONCATS = ("ConcatV2", "Pack")


@dataclasses.dataclass(frozen=True)
class Step:
    """An elementwise op on one column: which, and the constant beside it with its position."""

    node: NodeDef
    constant: np.ndarray | None
    position: int

    def like(self, other: Step) -> bool:
        """Whether the two do the same but for the constant."""
        both = (self.constant is None) == (other.constant is None) and self.position == other.position
        return both and _settings(self.node) == _settings(other.node)


@dataclasses.dataclass(frozen=True)
class Column:
    """A result that is made of one packed input alone: the input, and what is done to it, in order."""

    source: str
    steps: tuple[Step, ...]

    def like(self, other: Column) -> bool:
        """Whether the same is done to both."""
        return len(self.steps) == len(other.steps) and all(
            a.like(b) for a, b in zip(self.steps, other.steps, strict=True)
        )


def _settings(node: NodeDef) -> bytes:
    """The op and its attributes."""
    copy = NodeDef()
    copy.CopyFrom(node)
    copy.name = ""
    del copy.input[:]
    return copy.SerializeToString(deterministic=True)


def trace(graph: Graph, ref: str, widths: Mapping[str, int], ranks: Mapping[str, int], rank: int) -> Column | None:
    """Follows a tensor back to a column.

    Args:
      graph: the graph.
      ref: the tensor.
      widths: packed Placeholder -> columns that it has.
      ranks: packed Placeholder -> its rank, 1 or 2.
      rank: of the tensor.

    Returns:
      The column, or None where there is anything else between.
    """
    steps: list[Step] = []
    while True:
        name, port = split(ref)
        if name in widths:
            return Column(name, tuple(reversed(steps))) if ranks[name] == rank else None
        node = graph.nodes[name]
        refs = graph.data_inputs(node)
        if port or len(refs) != len(node.input):
            return None
        if node.op == "Identity":
            ref = refs[0]
        elif node.op == "ExpandDims" and rank == 2 and _is(graph.constant(refs[1]), [[1], [-1]]):
            ref, rank = refs[0], 1
        elif node.op == "Reshape" and rank == 2 and _is(graph.constant(refs[1]), [[-1, 1]]):
            source = split(refs[0])[0]
            if widths.get(source, 1) > 1:
                return None
            ref, rank = refs[0], ranks.get(source, 1)
        elif node.op in ELEMENTWISE and len(refs) == 1:
            steps.append(Step(node, None, 0))
            ref = refs[0]
        elif node.op in BINARY and len(refs) == 2:
            values = [(i, graph.constant(r)) for i, r in enumerate(refs)]
            single = [(i, value) for i, value in values if value is not None and value.size == 1 and value.ndim < 2]
            if len(single) != 1:
                return None
            position, constant = single[0]
            steps.append(Step(node, constant, position))
            ref = refs[1 - position]
        else:
            return None


def _is(value: np.ndarray | None, wanted: Sequence[Sequence[int]]) -> bool:
    return value is not None and value.reshape(-1).tolist() in [list(w) for w in wanted]


def joins(
    graph: Graph, widths: Mapping[str, int], ranks: Mapping[str, int]
) -> list[tuple[str, list[tuple[int, list[Column]]]]]:
    """Where columns are put together again.

    Returns:
      Of each such node, its name and runs of two inputs or more that are alike: the first one's index, and the columns.
    """
    found = []
    for node in graph.nodes.values():
        if node.op not in _CONCATS or any(ref.startswith("^") for ref in node.input):
            continue
        refs = list(node.input)
        if node.op == "ConcatV2":
            refs, axis, rank = refs[:-1], graph.constant(refs[-1]), 2
            if not _is(axis, [[1], [-1]]):
                continue
        else:
            rank = 1
            if attr(node, "axis").i not in (1, -1):
                continue
        runs: list[tuple[int, list[Column]]] = []
        for index, ref in enumerate(refs):
            column = trace(graph, ref, widths, ranks, rank)
            if column is None:
                continue
            last = runs[-1] if runs else None
            if last and last[0] + len(last[1]) == index and last[1][0].like(column):
                last[1].append(column)
            else:
                runs.append((index, [column]))
        runs = [run for run in runs if len(run[1]) > 1 and len({column.source for column in run[1]}) == len(run[1])]
        if runs and (node.op == "ConcatV2" or len(runs[0][1]) == len(refs)):
            found.append((node.name, runs))
    return found


def order(names: Sequence[str], found: Sequence[tuple[str, list[tuple[int, list[Column]]]]]) -> list[str]:
    """The columns in such an order that the longest runs stand together."""
    runs = sorted((columns for _, runs in found for _, columns in runs), key=len, reverse=True)
    chosen: dict[str, None] = {}
    for columns in runs:
        sources = [column.source for column in columns]
        if not chosen.keys() & set(sources):
            chosen.update(dict.fromkeys(sources))
    chosen.update(dict.fromkeys(names))
    return list(chosen)


def rejoin(
    graph: Graph,
    packed: str,
    dtype: tf.DType,
    starts: Mapping[str, int],
    widths: Mapping[str, int],
    found: Sequence[tuple[str, list[tuple[int, list[Column]]]]],
) -> int:
    """Takes runs of columns as they stand in the packed tensor; returns how many inputs of concatenations went.

    Args:
      graph: edited in place.
      packed: the packed tensor, (rows, columns).
      dtype: of it.
      starts: Placeholder -> its first column.
      widths: Placeholder -> columns that it has.
      found: of `joins`.
    """
    total, gone = sum(widths.values()), 0
    for name, runs in found:
        for index, columns in reversed(runs):
            sources = [column.source for column in columns]
            follow = [starts[a] + widths[a] == starts[b] for a, b in itertools.pairwise(sources)]
            if not all(follow):
                continue
            begin, size = starts[sources[0]], sum(widths[source] for source in sources)
            ref = packed
            if size < total:
                hint = f"{name}/columns"
                bounds = [
                    graph.add_constant(f"{hint}/{end}", np.array(v, np.int32))
                    for end, v in (("from", [0, begin]), ("size", [-1, size]))
                ]
                ref = graph.add_op(hint, "Slice", [packed, *bounds], T=dtype, Index=tf.int32)
            for number in range(len(columns[0].steps)):
                ref = _apply(graph, f"{name}/all_{number}", ref, [c.steps[number] for c in columns], sources, widths)
            node = graph.nodes[name]
            rest = [*node.input[:index], ref, *node.input[index + len(columns) :]]
            gone += len(columns) - 1
            values = len(rest) - (node.op == "ConcatV2")
            if values == 1:
                graph.redirect(name, ref)
                graph.redirect_control(name, [split(ref)[0]])
            else:
                graph.set_inputs(name, rest)
                node.attr["N"].i = values
    return gone


def _apply(
    graph: Graph, hint: str, ref: str, steps: Sequence[Step], sources: Sequence[str], widths: Mapping[str, int]
) -> str:
    """An elementwise op on all columns of a run."""
    node = NodeDef()
    node.CopyFrom(steps[0].node)
    node.name = graph.unique_name(hint)
    del node.input[:]
    node.input.append(ref)
    if steps[0].constant is not None:
        values = [np.repeat(s.constant.reshape(-1), widths[x]) for s, x in zip(steps, sources, strict=True)]  # type: ignore[union-attr]
        node.input.insert(steps[0].position, graph.add_constant(f"{hint}/constants", np.concatenate(values)))
    return graph.add(node)


def take_apart(
    graph: Graph,
    packed: str,
    dtype: tf.DType,
    names: Sequence[str],
    widths: Mapping[str, int],
    ranks: Mapping[str, int],
) -> None:
    """Gives those who still read a single input its columns of the packed tensor.

    Args:
      graph: edited in place.
      packed: the packed tensor, whose columns stand in the order of `names`.
      dtype: of it.
      names: the former Placeholders.
      widths: columns of each.
      ranks: 1 or 2, of each.
    """
    needed = [n for n in names if n in graph.nodes and (graph.users(n) or graph.output_labels(n))]
    flat = {name for name in names if ranks[name] == 1}
    hint = f"{packed}/columns"
    parts: dict[str, str] = {}
    if 2 * len(needed) < len(names):
        starts = dict(zip(names, itertools.accumulate([widths[n] for n in names], initial=0), strict=False))
        for name in needed:
            begin = graph.add_constant(f"{name}/from", np.array([0, starts[name]], np.int32))
            size = graph.add_constant(f"{name}/size", np.array([-1, widths[name]], np.int32))
            parts[name] = graph.add_op(f"{name}/column", "Slice", [packed, begin, size], T=dtype, Index=tf.int32)
    elif len(flat) == len(names):
        ref = graph.add_op(hint, "Unpack", [packed], T=dtype, axis=1, num=len(names))
        parts, flat = {name: join(ref, number) for number, name in enumerate(names)}, set()
    elif len(set(widths.values())) == 1:
        axis = graph.add_constant(f"{packed}/axis", np.array(1, np.int32))
        ref = graph.add_op(hint, "Split", [axis, packed], T=dtype, num_split=len(names))
        parts = {name: join(ref, number) for number, name in enumerate(names)}
    else:
        sizes = graph.add_constant(f"{packed}/sizes", np.array([widths[name] for name in names], np.int32))
        axis = graph.add_constant(f"{packed}/axis", np.array(1, np.int32))
        ref = graph.add_op(hint, "SplitV", [packed, sizes, axis], T=dtype, Tlen=tf.int32, num_split=len(names))
        parts = {name: join(ref, number) for number, name in enumerate(names)}
    for name in needed:
        part = parts[name]
        if name in flat:
            size = graph.add_constant(f"{name}/shape", np.array([-1], np.int32))
            part = graph.add_op(f"{name}/flat", "Reshape", [part, size], T=dtype, Tshape=tf.int32)
        graph.redirect(name, part)
        graph.redirect_control(name, [packed])
