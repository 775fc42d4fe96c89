"""The meaning of the ops that make a SparseTensor of a dense column: what each gives from what it takes.

See `sparse_columns`, which goes through the graph, and `sparse_values` for what tensors hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.lookups.row_values import Expr, assume
from tfopt.lookups.sparse_lookups import LOOKUPS, lookup, one_each
from tfopt.lookups.sparse_values import Distinct, Extent, Lookup, Numbers, Positions, Rows, Vector, Wide

if TYPE_CHECKING:
    from tfopt.lookups.sparse_columns import Columns

_INT32, _INT64 = tf.int32.as_datatype_enum, tf.int64.as_datatype_enum
_MASKS = ("begin", "end", "ellipsis", "new_axis", "shrink_axis")


def _where(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    rows = columns.value(refs[0])
    if not isinstance(rows, Rows) or rows.value.dtype != tf.bool:
        return None
    if not rows.tall:
        return Positions(rows.column, rows.mask, rows.value, tall=True)
    if rows.mask is not columns.pool.true:
        return None
    return Numbers(rows.column, columns.pool.simplify(rows.value), "pairs")


def _gather_nd(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    rows, at = columns.value(refs[0]), columns.value(refs[1])
    if not isinstance(rows, Rows) or not isinstance(at, Numbers | Positions) or at.column != rows.column:
        return None
    if isinstance(at, Numbers) and rows.mask is columns.pool.true and at.form == ("pairs" if rows.tall else "tall"):
        return Rows(rows.column, at.mask, rows.value, tall=False, derived=True)
    if isinstance(at, Positions) and at.tall and at.mask is rows.mask and not rows.tall:
        return dataclasses.replace(rows, mask=_narrowed(columns, at), derived=True)
    return None


def _narrowed(columns: Columns, at: Positions) -> Expr:
    """The mask of the rows at these positions."""
    pool = columns.pool
    return pool.both(at.mask, pool.simplify(at.inner, assume(at.mask, True)))


def _gather(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    source, at = columns.value(refs[0]), columns.value(refs[1])
    if node.op == "GatherV2" and (not columns.has(refs[2], 0) or node.attr["batch_dims"].i):
        return None
    if isinstance(at, Positions) and isinstance(source, Rows | Numbers):
        if at.tall or (source.column, source.mask) != (at.column, at.mask):
            return None
        mask = _narrowed(columns, at)
        if isinstance(source, Rows):
            return dataclasses.replace(source, mask=mask, derived=True)
        return None if source.form == "packed" else dataclasses.replace(source, mask=mask)
    if source is not None or len(columns.shape(refs[0]) or ()) != 2:
        return None
    if isinstance(at, Distinct) and not at.inverse and not at.table:
        return dataclasses.replace(at, table=refs[0])
    if isinstance(at, Rows) and at.derived and one_each(columns, at):
        return lookup(columns, refs[0], at)
    return None


def _reshape(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    if isinstance(given, Lookup):
        shape = columns.shape(refs[0]) or (None, None)
        return given if _fits(columns.entries(refs[1]), columns.size(given.column), shape[1]) else None
    if not isinstance(given, Rows | Numbers | Positions):
        return None
    target = columns.entries(refs[1])
    mask = columns.pool.both(given.mask, given.inner) if isinstance(given, Positions) else given.mask
    size = columns.size(given.column, mask)
    tall = _fits(target, size, 1)
    return _formed(given, tall) if tall or target in ([-1], [size]) else None


def _fits(target: list[Any] | None, rows: Any, width: int | None) -> bool:
    """Whether [rows, width] is what a target of Reshape, or of SparseReshape, stands for."""
    if target is None or len(target) != 2 or width is None or target == [-1, -1]:
        return False
    return target[0] in (-1, rows) and (target[1] in (-1, width))


def _formed(given: Any, tall: bool) -> Any:
    """The same as (k, 1) or (k,)."""
    if isinstance(given, Numbers):
        return dataclasses.replace(given, form="tall" if tall else "flat") if given.form in ("tall", "flat") else None
    return dataclasses.replace(given, tall=tall)


def _flat(given: Any) -> bool:
    return given.form == "flat" if isinstance(given, Numbers) else not given.tall


def _expand_dims(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    if not isinstance(given, Rows | Numbers | Positions) or not _flat(given):
        return None
    return _formed(given, True) if columns.has(refs[1], 1) or columns.has(refs[1], -1) else None


def _squeeze(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    dims = list(node.attr["squeeze_dims"].list.i)
    if not isinstance(given, Rows | Numbers | Positions) or dims not in ([1], [-1]):
        return None
    return None if _flat(given) else _formed(given, False)


def _cast(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    return given if isinstance(given, Numbers | Positions) and node.attr["DstT"].type in (_INT32, _INT64) else None


def _identity(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    return columns.value(refs[0])


def _range(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    limit = columns.entries(refs[1]) or [None]
    if not isinstance(limit[0], Extent) or not columns.has(refs[0], 0) or not columns.has(refs[2], 1):
        return None
    return Numbers(limit[0].column, columns.pool.true, "flat") if limit[0].mask is columns.pool.true else None


def _tile(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given, times = columns.value(refs[0]), columns.entries(refs[1]) or []
    if len(times) == 1 and isinstance(times[0], Extent) and columns.graph.constant(refs[0]) is not None:
        element = columns.scalar(refs[0])
        return element and Rows(times[0].column, times[0].mask, element, tall=False)
    if len(times) != 2 or times[0] != 1 or not isinstance(given, Rows | Numbers) or _flat(given):
        return None
    if times[1] == 1:
        return given
    if not isinstance(given, Rows) or given.mask is not columns.pool.true or times[1] is None:
        return None
    return Wide(given.column, given.value)


def _pack(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    if len(refs) != 2:
        return None
    numbers, zeros, axis = columns.value(refs[0]), columns.value(refs[1]), node.attr["axis"].i
    if not isinstance(numbers, Numbers) or numbers.form != "flat" or not isinstance(zeros, Rows) or zeros.tall:
        return None
    if (zeros.column, zeros.mask) != (numbers.column, numbers.mask):
        return None
    if zeros.value.op != "const" or zeros.value.value != 0:
        return None
    return dataclasses.replace(numbers, form="pairs" if axis in (1, -1) else "packed")


def _transpose(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    given = columns.value(refs[0])
    if isinstance(given, Numbers) and given.form == "packed" and columns.has(refs[1], 1, 0):
        return dataclasses.replace(given, form="pairs")
    return None


def _strided_slice(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    """indices[:, 0], or x[:, newaxis]"""
    given, masks = columns.value(refs[0]), {key: node.attr[f"{key}_mask"].i for key in _MASKS}
    if isinstance(given, Rows) and not given.tall and masks["new_axis"] == 2 and columns.has(refs[3], 1, 1):
        whole = masks["begin"] & masks["end"] & 1 and not masks["ellipsis"] and not masks["shrink_axis"]
        return dataclasses.replace(given, tall=True) if whole else None
    if not isinstance(given, Numbers) or given.form != "pairs" or (columns.entries(refs[1]) or [1])[-1] != 0:
        return None
    if masks["shrink_axis"] != 2 or masks["new_axis"] or masks["ellipsis"] or not masks["begin"] & masks["end"] & 1:
        return None
    return dataclasses.replace(given, form="flat") if columns.has(refs[3], 1, 1) else None


def _fill(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    sizes, element = columns.entries(refs[0]) or [], columns.scalar(refs[1])
    if not sizes or not isinstance(sizes[0], Extent) or sizes[1:] not in ([], [1]) or element is None:
        return None
    return Rows(sizes[0].column, sizes[0].mask, element, tall=len(sizes) == 2)


def _sparse_reshape(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    pairs = columns.value(refs[0])
    if not isinstance(pairs, Numbers) or pairs.form != "pairs":
        return None
    size = columns.size(pairs.column)
    if not columns.has(refs[1], size, 1) or not _fits(columns.entries(refs[2]), size, 1):
        return None
    return {0: pairs, 1: Vector((size, 1))}


def _sparse_tensor(columns: Columns, indices: str, values: str, shape: str) -> Rows | None:
    """The values of a SparseTensor of one column, {value_r : mask_r}."""
    pairs, rows = columns.value(indices), columns.value(values)
    if not isinstance(pairs, Numbers) or pairs.form != "pairs" or not isinstance(rows, Rows) or rows.tall:
        return None
    if (pairs.column, pairs.mask) != (rows.column, rows.mask):
        return None
    return rows if columns.has(shape, columns.size(rows.column), 1) else None


def _fill_empty_rows(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    rows, default, pool = _sparse_tensor(columns, *refs[:3]), columns.scalar(refs[3]), columns.pool
    if rows is None or default is None:
        return None
    filled = pool.simplify(pool.select(rows.mask, rows.value, default))
    return {
        0: Numbers(rows.column, pool.true, "pairs"),
        1: Rows(rows.column, pool.true, filled, tall=False, derived=True),
        2: Rows(rows.column, pool.true, pool.negate(rows.mask), tall=False, derived=True),
    }


def _sparse_to_dense(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    rows, default, pool = _sparse_tensor(columns, refs[0], refs[2], refs[1]), columns.scalar(refs[3]), columns.pool
    if rows is None or default is None:
        return None
    filled = pool.simplify(pool.select(rows.mask, rows.value, default))
    return Rows(rows.column, pool.true, filled, tall=True, derived=True)


def _sparse_cross(columns: Columns, node: NodeDef, refs: list[str]) -> Any:
    """A cross of dense columns has one value a row."""
    if node.attr["N"].i or not refs or not all(len(columns.shape(ref) or ()) == 2 for ref in refs):
        return None
    dense = columns.value(refs[0])
    if any((columns.shape(ref) or (0,))[1] != 1 for ref in refs) or not isinstance(dense, Rows):
        return None
    crossed = columns.leaf(f"{node.name}:1", dense.column)
    return {
        0: Numbers(dense.column, columns.pool.true, "pairs"),
        1: crossed,
        2: Vector((columns.size(dense.column), 1)),
    }


# What the outputs of these ops hold: of the first, a dict of port -> what it holds, or None where that is not known.
FOLLOW: dict[str, Callable[[Columns, NodeDef, list[str]], Any]] = {
    **{"Where": _where, "GatherNd": _gather_nd, "Gather": _gather, "GatherV2": _gather, "Reshape": _reshape},
    **{"ExpandDims": _expand_dims, "Squeeze": _squeeze, "Cast": _cast, "Identity": _identity, "Range": _range},
    **{"Tile": _tile, "Pack": _pack, "Transpose": _transpose, "StridedSlice": _strided_slice, "Fill": _fill},
    **{"SparseReshape": _sparse_reshape, "SparseFillEmptyRows": _fill_empty_rows, "SparseToDense": _sparse_to_dense},
    **{"SparseCross": _sparse_cross, **LOOKUPS},
}
