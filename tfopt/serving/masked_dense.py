"""Values with a mask that are made sparse, and dense again, are selected instead: no op between looks beyond its row.

    SparseToDense(Where(M), [rows, w], f(GatherNd(X, Where(M))), d) = Select(M, f(X), d)[:, :w]    w = max_r sum_c M_rc

It holds where each row of M is true in its first columns and false in the others, as clients fill it; f is elementwise.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, join, split
from tfopt.serving.late_broadcast.ops import ELEMENTWISE

# Elementwise ops that fail on what stands where there is no value.
_STRICT = ("CheckNumerics", "StringToNumber")


def select_instead(graph: Graph, masks: set[str]) -> int:
    """Rewrites what comes from the Placeholders in `masks`, in place; returns how often."""
    done = 0
    for node in list(graph.nodes.values()):
        if node.op != "SparseToDense" or any(ref.startswith("^") for ref in node.input):
            continue
        indices = _through(graph, node.input[0])
        mask = split(indices.input[0])[0] if indices.op == "Where" else None
        if mask not in masks:
            continue
        chain, source = _values(graph, node.input[2], indices.name)
        width = _width(graph, node.input[1], mask)
        if source is None or width is None:
            continue
        ref, dtype = source, tf.as_dtype(node.attr["T"].type)
        for step in chain:
            copy = NodeDef()
            copy.CopyFrom(step)
            copy.name = graph.unique_name(f"{step.name}/of_all")
            copy.input[-1 if step.op != "LookupTableFindV2" else 1] = ref
            ref = graph.add(copy)
        hint = f"{node.name}/selected"
        chosen = graph.add_op(hint, "SelectV2", [mask, ref, node.input[3]], T=dtype)
        zero = graph.add_constant(f"{hint}/zero", np.array(0, np.int64))
        begin = graph.add_constant(f"{hint}/from", np.zeros(2, np.int64))
        ones = graph.add_constant(f"{hint}/step", np.ones(2, np.int64))
        end = graph.add_op(f"{hint}/to", "Pack", [zero, width], T=tf.int64, N=2, axis=0)
        whole = {"begin_mask": 3, "end_mask": 1, "ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 0}
        cut = graph.add_op(f"{hint}/cut", "StridedSlice", [chosen, begin, end, ones], T=dtype, Index=tf.int64, **whole)
        graph.redirect(node.name, cut)
        graph.redirect_control(node.name, [split(cut)[0]])
        done += 1
    graph.sweep()
    return done


def _through(graph: Graph, ref: str) -> NodeDef:
    node = graph.producer(ref)
    while node.op == "Identity" and len(node.input) == 1:
        node = graph.producer(node.input[0])
    return node


def _values(graph: Graph, ref: str, indices: str) -> tuple[list[NodeDef], str | None]:
    """What is done to the values, in order, and what they were gathered from; None where that is something else."""
    chain: list[NodeDef] = []
    while True:
        node = graph.producer(ref)
        if split(ref)[1] or any(r.startswith("^") for r in node.input):
            return chain, None
        if node.op == "GatherNd":
            same = _through(graph, node.input[1]).name == indices
            return chain[::-1], node.input[0] if same else None
        if node.op == "LookupTableFindV2":
            ref = node.input[1]
        elif node.op in ELEMENTWISE and node.op not in _STRICT and len(node.input) == 1:
            ref = node.input[0]
        else:
            return chain, None
        chain.append(node)


def _width(graph: Graph, ref: str, mask: str) -> str | None:
    """The second entry of [rows, w] of a mask, as `sparse_inputs` writes it, int64; None for another shape."""
    pack = _through(graph, ref)
    if pack.op != "Pack" or len(pack.input) != 2:
        return None
    count, width = (_through(graph, entry) for entry in pack.input)
    if count.op != "Size" or width.op != "Max":
        return None
    padded, lengths = graph.producer(width.input[0]), join(*split(count.input[0]))
    if padded.op != "ConcatV2" or lengths not in [join(*split(r)) for r in padded.input[:-1]]:
        return None
    sums = graph.producer(lengths)
    ones = graph.producer(sums.input[0]) if sums.op == "Sum" else None
    same = ones is not None and ones.op == "Cast" and split(ones.input[0])[0] == mask
    return width.name if same and tf.as_dtype(width.attr["T"].type) == tf.int64 else None
