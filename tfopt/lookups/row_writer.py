"""Writes expressions of one row, and lookups by them, as nodes: for `dense_lookups`, which says what they are."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, split
from tfopt.lookups.row_tables import constants, evaluate, tabulate
from tfopt.lookups.row_values import Expr, assume, bounds, parts
from tfopt.lookups.sparse_columns import Columns
from tfopt.lookups.sparse_values import Lookup, Rows

# A table that others read too is copied up to this size.
_MAX_COPY_BYTES = 65536


class RowWriter:
    """Adds the nodes that compute expressions and lookups to a graph."""

    def __init__(self, graph: Graph, columns: Columns):
        self._graph, self._columns, self._pool = graph, columns, columns.pool
        self._refs: dict[Expr, str] = dict(columns.flat)
        self._tables: dict[tuple[str, tuple[int, ...]], str] = {}
        self._lookups: dict[Lookup, str] = {}
        self._reshaped: dict[tuple[str, tuple[int, ...]], str] = {}

    def rows(self, rows: Rows) -> str | None:
        """(N,) or (N, 1); None for a constant."""
        value = self._pool.simplify(rows.value)
        if not value.rowwise:
            return None
        return self._reshape(self._flat(value), (-1, 1), value.dtype) if rows.tall else self._flat(value)

    def lookup(self, lookup: Lookup) -> str | None:
        """(N, D); None where ids are not of a row."""
        if lookup not in self._lookups:
            new = self._hot(lookup) if lookup.hot else self._tabulated(lookup) or self._gathered(lookup)
            if new is None:
                return None
            self._lookups[lookup] = new
        return self._lookups[lookup]

    def _hot(self, lookup: Lookup) -> str | None:
        if not lookup.ids.rowwise:
            return None
        node = self._graph.nodes[lookup.hot]
        attrs = {key: attr for key, attr in node.attr.items() if key != "axis"}
        ids = self._flat(lookup.ids)
        return self._graph.add_op(f"{node.name}/rows", "OneHot", [ids, *node.input[1:]], **attrs)

    def _gathered(self, lookup: Lookup) -> str | None:
        graph, pool, zero = self._graph, self._pool, lookup.zero
        valid = pool.simplify(lookup.ids, assume(zero, False))
        table = graph.constant(lookup.table)
        if zero is pool.false:
            return self._gather(lookup.table, self._flat(valid), valid.dtype) if valid.rowwise else None
        if not zero.rowwise:
            return None
        least, most = bounds(valid, assume(zero, False))
        if table is not None and least >= 0 and most < len(table) and self._may_copy(lookup.table):
            count = len(table)
            ids = pool.simplify(pool.select(zero, pool.const(count, valid.dtype), valid))
            return self._gather(self._rows_of(lookup.table, [*range(count + 1)]), self._flat(ids), ids.dtype)
        if not lookup.ids.rowwise:
            return None
        found = self._gather(lookup.table, self._flat(lookup.ids), lookup.ids.dtype)
        dtype = self._columns.dtype(lookup.table)
        zeros = graph.add_constant(f"{lookup.table}/zero", np.zeros((), dtype.as_numpy_dtype))
        where = self._reshape(self._flat(zero), (-1, 1), tf.bool)
        return graph.add_op(f"{lookup.table}/or_zero", "SelectV2", [where, zeros, found], T=dtype)

    def _tabulated(self, lookup: Lookup) -> str | None:
        """T[clip(x - a, 0, b)] where all depends on one integer x; None where it does not."""
        table = self._graph.constant(lookup.table)
        if table is None:
            return None
        count = len(table)
        for x in dict.fromkeys([*parts(lookup.ids), *parts(lookup.zero)]):
            if not x.rowwise or x.dtype not in (tf.int32, tf.int64):
                continue
            cuts, more = constants(lookup.ids, x), constants(lookup.zero, x)
            if cuts is None or more is None:
                continue

            def row(at: int, x: Expr = x) -> int | None:
                index = count if evaluate(lookup.zero, x, at) else int(evaluate(lookup.ids, x, at))
                return index if 0 <= index < count or evaluate(lookup.zero, x, at) else None

            found = tabulate(row, cuts | more, bounds(x), 2 * count + 16)
            if found is None:
                return None
            first, entries = found
            as_it_is = first == 0 and entries == [*range(len(entries))] and len(entries) <= count
            if not as_it_is and not self._may_copy(lookup.table):
                return None
            ids = self._clipped(x, first, first + len(entries) - 1)
            return self._gather(lookup.table if as_it_is else self._rows_of(lookup.table, entries), ids, x.dtype)
        return None

    def _clipped(self, x: Expr, first: int, last: int) -> str:
        """clip(x, first, last) - first"""
        ref, own = self._flat(x), bounds(x)
        for op, bound, needed in (("Maximum", first, own[0] < first), ("Minimum", last, own[1] > last)):
            if needed:
                ref = self._graph.add_op(f"{split(ref)[0]}/{op}", op, [ref, self._scalar(bound, x.dtype)], T=x.dtype)
        if first == 0:
            return ref
        return self._graph.add_op(f"{split(ref)[0]}/from_0", "Sub", [ref, self._scalar(first, x.dtype)], T=x.dtype)

    def _may_copy(self, table: str) -> bool:
        value = self._graph.constant(table)
        return value is not None and (value.nbytes <= _MAX_COPY_BYTES or len(self._graph.users(split(table)[0])) == 1)

    def _rows_of(self, table: str, entries: list[int]) -> str:
        """These rows of a constant table; the one after the last is zeros."""
        key = table, tuple(entries)
        if key not in self._tables:
            value = self._graph.constant(table)
            assert value is not None
            zeros = np.zeros((1, *value.shape[1:]), value.dtype)
            self._tables[key] = self._graph.add_constant(f"{table}/rows", np.concatenate([value, zeros])[entries])
        return self._tables[key]

    def _gather(self, table: str, ids: str, dtype: tf.DType) -> str:
        value = self._graph.constant(table)
        params = self._columns.dtype(table) if value is None else tf.as_dtype(value.dtype)
        axis = self._scalar(0, tf.int32)
        types = {"Tparams": params, "Tindices": dtype, "Taxis": tf.int32}
        return self._graph.add_op(f"{split(table)[0]}/lookup", "GatherV2", [table, ids, axis], batch_dims=0, **types)

    def _scalar(self, value: object, dtype: tf.DType) -> str:
        return self._flat(self._pool.const(value, dtype))

    def _reshape(self, ref: str, shape: tuple[int, ...], dtype: tf.DType) -> str:
        """(N,) as (N, 1), or the other way round."""
        if (ref, shape) not in self._reshaped:
            hint = f"{split(ref)[0]}/{'tall' if len(shape) == 2 else 'flat'}"
            target = self._graph.add_constant(f"{hint}/shape", np.array(shape, np.int32))
            self._reshaped[ref, shape] = self._graph.add_op(hint, "Reshape", [ref, target], T=dtype, Tshape=tf.int32)
        return self._reshaped[ref, shape]

    def _flat(self, e: Expr) -> str:
        """A tensor (N,) that holds an expression; () for a scalar."""
        if e not in self._refs:
            if e.op == "const":
                hint = "row/constant"
                self._refs[e] = self._graph.add_constant(hint, np.array(e.value, e.dtype.as_numpy_dtype))
            elif e in self._columns.tall:
                self._refs[e] = self._reshape(self._columns.tall[e], (-1,), e.dtype)
            elif e.op == "leaf":
                self._refs[e] = e.value
            else:
                node = NodeDef.FromString(e.code)
                node.input.extend([self._flat(arg) for arg in e.args])
                node.name = self._graph.unique_name(f"row/{e.op}")
                self._refs[e] = self._graph.add(node)
        return self._refs[e]
