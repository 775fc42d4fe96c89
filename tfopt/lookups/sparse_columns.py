"""Which tensors of a graph hold one value a row of a dense column, or of those of its rows where a mask holds.

    Where(x != c) = rows {r : m_r}     GatherNd(x, rows) = {x_r : m_r}     SparseFillEmptyRows = {m_r ? x_r : d}

What feature columns make of a dense column, a SparseTensor and lookups of it, is followed op by op, in topological
order, as expressions of one row (`row_values`). A tensor whose meaning is not known ends that; nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, Shape, join, split
from tfopt.lookups.row_values import MAX_SIZE, UNBOUNDED, Bounds, Expr, Pool, bounds
from tfopt.lookups.sparse_ops import FOLLOW
from tfopt.lookups.sparse_values import Extent, Lookup, Rows, Vector, Wide
from tfopt.passes.fold_shapes import evaluate

# Ops that work element by element, and fail for no element: rows that a mask leaves out may go through them too.
_ELEMENTWISE = (
    *("Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual", "LogicalAnd", "LogicalOr", "LogicalNot"),
    *("Select", "SelectV2", "Add", "AddV2", "Sub", "Mul", "Neg", "Maximum", "Minimum", "Cast", "AsString", "ZerosLike"),
    *("OnesLike", "Bucketize", "LookupTableFindV2"),
    *("StringToHashBucket", "StringToHashBucketFast", "StringToHashBucketStrong"),
)
_HAND_ON = ("Identity", "Cast", "Squeeze", "ExpandDims", "Reshape")
_LONGEST = 16  # no shape has more dimensions that anybody computes with
Tables = Callable[[str], tuple[Bounds, Bounds]]
_MOST_KEYS = 2**48  # no table has more: a hash bucket plus its size does not overflow


class Columns:
    """What is known of the tensors of a graph.

    Attributes:
      pool: of the expressions.
      values: reference -> what it holds.
      known: names of the nodes of which something is known.
      flat, tall: expression -> a tensor (N,), or (N, 1), of the graph as it is that holds it.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, tuple[tf.DType, Shape]], tables: Tables):
        """Follows the nodes of a graph.

        Args:
          graph: it stays as it is.
          tensors: reference -> type and static shape, see `graph.infer_tensors`.
          tables: reference of a hash table -> bounds of the values that it holds, and of their number.
        """
        self.graph, self.pool, self._tensors, self._tables = graph, Pool(), tensors, tables
        self.values: dict[str, Any] = {}
        self.known: set[str] = set()
        self.flat: dict[Expr, str] = {}
        self.tall: dict[Expr, str] = {}
        self._leaves: dict[str, Rows | None] = {}
        for node in graph.topological():
            if graph.control_inputs(node) or graph.constant(node.name) is not None:
                continue
            found = self._follow(node, [join(*split(ref)) for ref in graph.data_inputs(node)])
            ports = found if isinstance(found, dict) else {0: found}
            for port, value in ports.items():
                if value is not None:
                    if isinstance(value, Rows):
                        self._noted(join(node.name, port), value)
                    self.values[join(node.name, port)] = value
                    self.known.add(node.name)

    # -- what is known ----------------------------------------------------------------------------------------------

    def value(self, ref: str) -> Any:
        """What a tensor holds; None where nothing is known of it."""
        return self.values.get(ref) or self._leaf(ref)

    def shape(self, ref: str) -> Shape:
        """Its static shape."""
        return self._tensors[ref][1] if ref in self._tensors else None

    def size(self, column: str, mask: Expr | None = None) -> int | Extent:
        """How many rows a column has, or how many of them a mask holds for."""
        if mask is None or mask is self.pool.true:
            shape = self.shape(column)
            return shape[0] if shape and shape[0] is not None else Extent(column, self.pool.true)
        return Extent(column, mask)

    def _leaf(self, ref: str) -> Rows | None:
        if ref not in self._leaves:
            shape = self.shape(ref)
            column = shape is not None and (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1))
            self._leaves[ref] = None
            if column and self.graph.constant(ref) is None and split(ref)[1] >= 0:
                self._leaves[ref] = self.leaf(ref, ref)
        return self._leaves[ref]

    def leaf(self, ref: str, column: str) -> Rows:
        """What a tensor of one value for each row of a column, (N,) or (N, 1), holds: itself."""
        leaf = self.pool.leaf(ref, self.dtype(ref), self._own(ref))
        return self._noted(ref, Rows(column, self.pool.true, leaf, len(self.shape(ref) or ()) == 2))

    def _noted(self, ref: str, rows: Rows) -> Rows:
        if rows.mask is self.pool.true and rows.value.rowwise and not rows.derived:
            (self.tall if rows.tall else self.flat).setdefault(rows.value, ref)
        return rows

    def _own(self, ref: str) -> Bounds:
        """Bounds of what a tensor holds, by the op that made it."""
        node = self.graph.producer(ref)
        while node.op in ("Identity", "Reshape", "Squeeze", "ExpandDims"):
            ref = node.input[0]
            node = self.graph.producer(ref)
        if node.op in ("UpperBound", "LowerBound") and (shape := self.shape(join(*split(node.input[0])))):
            return UNBOUNDED if shape[-1] is None else (0, shape[-1])
        if node.op == "SparseCross" and node.attr["num_buckets"].i > 0 and node.attr["hashed_output"].b:
            return 0, node.attr["num_buckets"].i - 1
        if node.op == "LookupTableSizeV2":
            size = self._tables(node.input[0])[1]
            return max(size[0], 0), min(size[1], _MOST_KEYS)
        return UNBOUNDED

    def scalar(self, ref: str) -> Expr | None:
        """A tensor of one element as an expression; None for any other."""
        value = self.graph.constant(ref)
        if value is not None:
            return self.pool.const(value.reshape(-1).tolist()[0], self.dtype(ref)) if value.size == 1 else None
        return self.pool.leaf(ref, self.dtype(ref), self._own(ref), rowwise=False) if self.shape(ref) == () else None

    def dtype(self, ref: str) -> tf.DType:
        """Its type."""
        return self._tensors[ref][0]

    def entries(self, ref: str) -> list[Any] | None:
        """What is known of the entries of a small integer tensor, a scalar as a list of one; None for nothing."""
        value = self.graph.constant(ref)
        if value is not None:
            return [int(v) for v in value.reshape(-1)] if value.size <= _LONGEST and value.dtype.kind in "iu" else None
        known = self.values.get(ref)
        return list(known.entries) if isinstance(known, Vector) else None

    def has(self, ref: str, *wanted: Any) -> bool:
        """Whether a small integer tensor has these entries."""
        return self.entries(ref) == list(wanted)

    # -- the nodes ---------------------------------------------------------------------------------------------------

    def _follow(self, node: NodeDef, refs: list[str]) -> Any:
        special = FOLLOW.get(node.op)
        found = special(self, node, refs) if special else None
        if found is None and node.op in _ELEMENTWISE:
            found = self._elementwise(node, refs)
        return self._vector(node, refs) if found is None else found

    def _elementwise(self, node: NodeDef, refs: list[str]) -> Rows | None:
        given = [self.scalar(ref) or self.value(ref) for ref in refs]
        rows = [g for g in given if isinstance(g, Rows)]
        if not rows or not all(isinstance(g, Rows | Expr) for g in given):
            return None
        first = rows[0]
        if any((r.column, r.mask, r.tall) != (first.column, first.mask, first.tall) for r in rows):
            return None
        if any(len(self.shape(ref) or ()) > 1 + first.tall for ref in refs):
            return None  # broadcasting would add a dimension
        args = [g.value if isinstance(g, Rows) else g for g in given]
        own = UNBOUNDED
        if node.op.startswith("StringToHashBucket"):
            own = 0, node.attr["num_buckets"].i - 1
        elif node.op == "Bucketize":
            own = 0, len(node.attr["boundaries"].list.f)
        elif node.op == "LookupTableFindV2" and self.dtype(node.name).is_integer:
            held, default = self._tables(refs[0])[0], bounds(args[2])
            own = min(held[0], default[0]), max(held[1], default[1])
        value = self.pool.apply(node, args, self.dtype(node.name), own)
        if value.size > MAX_SIZE:
            return None
        derived = any(r.derived for r in rows)
        return Rows(first.column, first.mask, value, first.tall, derived)

    def _vector(self, node: NodeDef, refs: list[str]) -> Vector | None:
        if node.name not in self._tensors or not self.dtype(node.name).is_integer:
            return None
        shape = self.shape(node.name) or (None,)  # of no known rank: what takes the shape of a lookup in a hash table
        if len(shape) > 1 or (shape[0] or 0) > _LONGEST:
            return None
        if node.op == "Shape":
            found = self._dimensions(refs[0])
        elif node.op in _HAND_ON:
            found = self.entries(refs[0])
        else:
            try:
                found = evaluate(node, [self.entries(ref) for ref in refs])
            except TypeError:  # arithmetic on a number of rows
                return None
        if self.shape(node.name) == ():
            shape = (1,)
        return Vector(tuple(found)) if found is not None and shape[0] in (None, len(found)) else None

    def _dimensions(self, ref: str) -> list[Any] | None:
        known, shape = self.value(ref), self.shape(ref)
        if isinstance(known, Rows):
            return [self.size(known.column, known.mask), *([1] if known.tall else [])]
        if isinstance(known, Lookup | Wide) and shape:
            return [self.size(known.column), *shape[1:]]
        return None if shape is None else list(shape)
