"""The meaning of the ops that look up one row of a table for each row of a column, and put zeros in the place of some.

See `sparse_ops`, which calls them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.lookups.row_values import Expr
from tfopt.lookups.sparse_values import Distinct, Hot, Lookup, Numbers, Rows, Wide

if TYPE_CHECKING:
    from tfopt.lookups.sparse_columns import Columns

SEGMENT_OPS = (
    *("SparseSegmentSum", "SparseSegmentMean", "SparseSegmentSqrtN", "SegmentSum", "SegmentMean"),
    *("SparseSegmentSumWithNumSegments", "SparseSegmentMeanWithNumSegments", "SparseSegmentSqrtNWithNumSegments"),
)


def one_each(columns: Columns, value: Any) -> bool:
    """Whether there is one value, or number, for each row, (N,)."""
    if isinstance(value, Rows):
        return value.mask is columns.pool.true and not value.tall
    return isinstance(value, Numbers) and value.mask is columns.pool.true and value.form == "flat"


def lookup(columns: Columns, table: str, ids: Rows) -> Lookup:
    """The rows of a table that one id for each row names."""
    return Lookup(ids.column, table, columns.pool.simplify(ids.value), columns.pool.false)


def _unique(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    rows = columns.value(refs[0])
    if not isinstance(rows, Rows) or not rows.derived or not one_each(columns, rows):
        return None
    return {0: Distinct(rows), 1: Distinct(rows, inverse=True)}


def _segments(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    """One row of a table for each segment: the sum, the mean and the root of the squares' sum are that row."""
    sparse = node.op.startswith("Sparse")
    source, numbers = columns.value(refs[0]), columns.value(refs[1 + sparse])
    if not one_each(columns, numbers) or not isinstance(numbers, Numbers):
        return None
    if len(refs) > 2 + sparse and not columns.has(refs[2 + sparse], columns.size(numbers.column)):
        return None
    if not sparse:
        return source if isinstance(source, Lookup) and source.column == numbers.column else None
    ids, table = columns.value(refs[1]), refs[0]
    if isinstance(source, Distinct) and source.table and ids == Distinct(source.rows, inverse=True):
        ids, table = source.rows, source.table
    elif source is not None or len(columns.shape(table) or ()) != 2:
        return None
    right = isinstance(ids, Rows) and one_each(columns, ids) and ids.column == numbers.column
    return lookup(columns, table, ids) if right else None


def _zeros_like(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    if not isinstance(given, Lookup):
        return None
    return Wide(given.column, columns.pool.const(0, columns.dtype(refs[0])))


def _select(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    """Zeros in the place of some rows of a lookup."""
    condition, *choices = (columns.value(ref) for ref in refs)
    lookup = next((choice for choice in choices if isinstance(choice, Lookup)), None)
    if lookup is None or lookup.hot or not isinstance(condition, Rows | Wide) or condition.column != lookup.column:
        return None
    if isinstance(condition, Rows) and condition.mask is not columns.pool.true:
        return None
    if isinstance(condition, Rows) and not condition.tall and node.op == "SelectV2":
        return None  # along the wrong dimension; Select takes a vector as one of rows
    at = choices.index(lookup)
    other, zero = choices[1 - at], columns.graph.constant(refs[2 - at])
    zeros = isinstance(other, Wide) and other.column == lookup.column and _is_zero(other.value)
    if not zeros and (zero is None or zero.ndim > 2 or zero.size == 0 or bool(np.any(zero != 0))):
        return None
    where = condition.value if at == 1 else columns.pool.negate(condition.value)
    return dataclasses.replace(lookup, zero=columns.pool.simplify(columns.pool.either(lookup.zero, where)))


def _is_zero(value: Expr) -> bool:
    return value.op == "const" and value.value == 0


def _one_hot(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    rows = columns.value(refs[0])
    last = node.attr["axis"].i in (-1, 2)
    tall = isinstance(rows, Rows) and rows.derived and rows.tall and rows.mask is columns.pool.true
    return Hot(rows, node.name) if tall and last else None


def _sum(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    if (
        not isinstance(given, Hot)
        or node.attr["keep_dims"].b
        or not (columns.has(refs[1], 1) or columns.has(refs[1], -2))
    ):
        return None
    return Lookup(given.rows.column, "", columns.pool.simplify(given.rows.value), columns.pool.false, hot=given.node)


LOOKUPS: dict[str, Callable[[Columns, NodeDef, list[str]], Any]] = {
    **{"Unique": _unique, "ZerosLike": _zeros_like, "OneHot": _one_hot, "Sum": _sum},
    **{"Select": _select, "SelectV2": _select},
    **dict.fromkeys(SEGMENT_OPS, _segments),
}
