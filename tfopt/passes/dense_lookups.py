"""dense_lookups: looks up the one id of each row at once, where feature columns go through sparse tensors.

    y_r = valid_r ? W[id_r] : 0,    with valid and id known functions of the row's value x_r

Where they depend on one integer x alone, as range checks do, that is y_r = T[clip(x_r - a, 0, b)] with the table T made
here: rows of W, and zeros. Otherwise ids of rows that are not valid name a row of zeros that W gets at its end.
`sparse_columns` finds out what the lookups are of.
"""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, infer_tensors, join, split
from tfopt.lookups.row_values import INFINITY, UNBOUNDED, Bounds
from tfopt.lookups.row_writer import RowWriter
from tfopt.lookups.sparse_columns import Columns
from tfopt.lookups.sparse_lookups import SEGMENT_OPS
from tfopt.lookups.sparse_values import Lookup, Rows
from tfopt.model import Model
from tfopt.passes import Pass
from tfopt.rewrite import Log

_LOOPS = ("NextIteration", "RefNextIteration")
_RULE = "one lookup per row"
_SPARSE = ("SparseFillEmptyRows", *(op for op in SEGMENT_OPS if op.startswith("Sparse")))
_FILLS = ("InitializeTableV2", "LookupTableImportV2")
_READS = ("LookupTableFindV2", "LookupTableSizeV2", "LookupTableExportV2")


def run(model: Model, log: Log) -> None:
    """Looks up ids of dense columns directly, in the main body, in place."""
    graph = model.graph
    ops = {node.op for node in graph.nodes.values()}
    if not ops & {*_SPARSE, "SparseToDense"}:
        return
    if ops & set(_LOOPS):
        log.refused[_RULE, "graph"] = "TF 1 loops have no static shapes"
        return
    columns = Columns(graph, infer_tensors(graph, model.library()), lambda table: table_bounds(graph, table))
    writer = RowWriter(graph, columns)
    done: set[str] = set()
    # Lookups that are used as they are, then those of which only shapes are taken, then ids that nothing looks up.
    for kind, ends in ((Lookup, True), (Lookup, False), (Rows, True)):
        for ref, value in columns.values.items():
            if isinstance(value, kind) and ref not in done and _wanted(graph, columns, ref, ends):
                new = writer.lookup(value) if isinstance(value, Lookup) else writer.rows(value)
                if new is not None and new != ref:
                    graph.redirect(ref, new)
                    log.applied[_RULE if kind is Lookup else "dense ids"] += 1
                    done.add(ref)
    graph.sweep()
    for node in graph.topological():
        if node.op in _SPARSE:
            log.refused[_RULE, node.name] = _reason(columns, node)


def _wanted(graph: Graph, columns: Columns, ref: str, ends: bool) -> bool:
    """Whether a tensor is to be computed anew: an op takes it that knows nothing of sparse columns."""
    name, port = split(ref)
    value = columns.values[ref]
    if isinstance(value, Rows) and not (value.derived and value.mask is columns.pool.true):
        return False
    live = graph.reachable(graph.roots())
    uses = [(user, used) for user, _, used in graph.uses(name) if user in live]
    if isinstance(value, Rows) and any(used != port for _, used in uses):
        return False  # the node would stay
    is_output = any(split(out) == (name, port) for out in graph.outputs.values())
    if ends and not is_output and all(user in columns.known for user, used in uses if used == port):
        return False
    return name in live


def _reason(columns: Columns, node: NodeDef) -> str:
    for ref in columns.graph.data_inputs(node):
        source = columns.graph.producer(ref)
        if columns.value(join(*split(ref))) is None and columns.graph.constant(ref) is None:
            return f"{source.op} {source.name!r}, which it takes, is not known to hold one id a row"
    if node.name in columns.known:
        return "what it gives is used in a way that is not known"
    return "its inputs are not of the same column, with one id a row"


def table_bounds(graph: Graph, handle: str) -> tuple[Bounds, Bounds]:
    """Bounds of the integers that a static hash table holds, and of their number, by the nodes that fill it.

    Args:
      graph: the main body.
      handle: reference of the table.
    """
    unknown = UNBOUNDED, UNBOUNDED
    table = graph.producer(handle)
    if table.op != "HashTableV2":
        return unknown
    name = table.attr["shared_name"].s
    named = [n.name for n in graph.nodes.values() if n.op == table.op and name and n.attr["shared_name"].s == name]
    found: list[tuple[Bounds, Bounds]] = []
    for user in (user for one in dict.fromkeys([table.name, *named]) for user in graph.users(one)):
        node = graph.nodes[user]
        if node.op in _READS:
            continue
        keys, values = (graph.constant(ref) if ref[0] != "^" else None for ref in [*node.input, "^", "^"][1:3])
        if node.op in _FILLS and keys is not None and values is not None and values.size and values.dtype.kind in "iu":
            found.append(((int(values.min()), int(values.max())), (np.unique(keys).size, keys.size)))
        elif node.op == "InitializeTableFromTextFileV2" and node.attr["value_index"].i == -1:
            size = node.attr["vocab_size"].i  # the values are line numbers; -1 for all lines
            found.append(((0, size - 1), (0, size)) if size > 0 else ((0, INFINITY), (0, INFINITY)))
        else:
            return unknown
    if not found:
        return unknown
    held = min(v[0] for v, _ in found), max(v[1] for v, _ in found)
    return held, (max(n[0] for _, n in found), sum(n[1] for _, n in found))


PASS = Pass("dense_lookups", run, needs=("fold_constants",), keeps=("sparsity", "ranges"))
