"""Tables of embeddings: where a graph looks rows up, how often each row is read, and what takes a lookup's place.

    GatherV2, Gather                      E[i]
    SparseSegmentSum, Mean, SqrtN         sum_j E[i_j] of a segment: the rows are looked up, and then reduced as before
    MatMul of OneHot                      E[i], and 0 where i is not in [0, n)

A compressed form of a table E (n, d) stores other arrays, from which its `lookup` makes E[i] by ops of any runtime.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.calibration import values
from tfopt.data import Dataset, batch_size
from tfopt.graph import Graph, Shape, infer_tensors, join, make_node, split
from tfopt.model import Model
from tfopt.rewrite import Refused
from tfopt.rules.constants import attr
from tfopt.verify import input_specs

_GATHERS = ("GatherV2", "Gather")
_SEGMENTS = tuple(
    f"SparseSegment{reduction}{suffix}" for reduction in ("Sum", "Mean", "SqrtN") for suffix in ("", "WithNumSegments")
)
# Row numbers are computed in int32, the one integer type that every runtime divides.
_MAX_ROWS = 1 << 30

Tensors = dict[str, tuple[tf.DType, Shape]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is only looked up.

    Attributes:
      name: of the weight.
      lookups: the nodes that read it.
      ids: the reference to the ids of each lookup.
    """

    name: str
    lookups: tuple[str, ...]
    ids: tuple[str, ...]


def find(graph: Graph, name: str) -> Table:
    """The lookups of a weight.

    Raises:
      Refused: something else reads it too, or it is no float32 table of two axes.
    """
    value = graph.weights[name]
    if graph.output_labels(name) or name in graph.keep:
        raise Refused("it is a result of the graph")
    lookups, ids = [], []
    for user, index, port in graph.uses(name):
        node = graph.nodes[user]
        ref = _ids(graph, node, index) if port == 0 else None
        if ref is None:
            raise Refused(f"{node.op} {user!r} reads it otherwise than a lookup of rows does")
        lookups.append(user)
        ids.append(ref)
    if value.dtype != np.float32 or value.ndim != 2:
        raise Refused(f"it is {value.dtype} of {value.ndim} axes; tables are float32 of (rows, width)")
    if not np.isfinite(value).all():
        raise Refused("it is not finite")
    if len(value) > _MAX_ROWS:
        raise Refused(f"it has more than {_MAX_ROWS:,} rows")
    return Table(name, tuple(lookups), tuple(ids))


def is_lookup(graph: Graph, name: str) -> bool:
    """Whether something looks rows of a weight up."""
    return any(port == 0 and _ids(graph, graph.nodes[user], index) for user, index, port in graph.uses(name))


def _ids(graph: Graph, node: NodeDef, index: int) -> str | None:
    """The ids by which a node reads rows of its operand `index`; None where it does something else."""
    refs = graph.data_inputs(node)
    if node.op in _GATHERS and index == 0:
        axis = graph.constant(refs[2]) if node.op == "GatherV2" else np.zeros(())
        return refs[1] if axis is not None and int(axis) == 0 and not attr(node, "batch_dims").i else None
    if node.op in _SEGMENTS and index == 0:
        return refs[1]
    if node.op == "MatMul" and index == 1 and not attr(node, "transpose_a").b and not attr(node, "transpose_b").b:
        hot = graph.producer(refs[0])
        last = hot.op == "OneHot" and (attr(hot, "axis").i in (-1, 1) or "axis" not in hot.attr)
        if not last or refs[0] != hot.name:
            return None
        ids, *settings = graph.data_inputs(hot)
        depth, on, off = (graph.constant(ref) for ref in settings)
        if depth is None or on is None or off is None or float(on) != 1 or float(off) != 0:
            return None
        return ids
    return None


def count(model: Model, signature: str, table: Table, rows: Dataset) -> np.ndarray | None:
    """How often each row of a table is read.

    Args:
      model: the model.
      signature: the one that `rows` are of.
      table: in the main body.
      rows: inputs.

    Returns:
      (n,) int64; None where no lookup depends on this signature alone.
    """
    graph = model.graph
    size = len(graph.weights[table.name])
    fed = {split(info.name)[0] for info in model.signatures[signature].inputs.values() if info.name}
    outer = set(graph.arguments) - fed
    refs = [ref for ref in dict.fromkeys(table.ids) if not graph.reachable([split(ref)[0]]) & outer]
    if not refs:
        return None
    fixed = batch_size(input_specs(model, signature), 0)
    counts = np.zeros(size, np.int64)
    for start, tensors in values(model, signature, refs, rows):
        for array in tensors.values():
            if array.ndim and len(array) == fixed:  # filled up with the first rows at the end: they do not count again
                array = array[: len(rows) - start]
            found = array.astype(np.int64).ravel()
            counts += np.bincount(found[(found >= 0) & (found < size)], minlength=size)
    return counts


class Writer:
    """Writes the nodes of one lookup.

    Attributes:
      graph: edited in place.
      hint: how the names of the nodes begin.
      ids: the reference to the ids.
      dtype: of the ids.
      rank: of the ids; None where it is not known.
    """

    def __init__(self, graph: Graph, hint: str, ids: str, tensors: Tensors):
        self.graph = graph
        self.hint = hint
        self.ids = ids
        self.dtype, shape = tensors[join(*split(ids))]
        self.rank = None if shape is None else len(shape)

    def constant(self, role: str, value: object, dtype: tf.DType) -> str:
        """A constant."""
        return self.graph.add_constant(f"{self.hint}/{role}", np.asarray(value, dtype.as_numpy_dtype))

    def op(self, role: str, op: str, *inputs: str, **attrs: object) -> str:
        """A node."""
        return self.graph.add_op(f"{self.hint}/{role}", op, inputs, **attrs)

    def cast(self, ref: str, source: tf.DType, target: tf.DType) -> str:
        """A tensor in another type; itself where that is its own."""
        return ref if source == target else self.op("cast", "Cast", ref, SrcT=source, DstT=target)

    def gather(self, role: str, table: str, ids: str, dtype: tf.DType, index: tf.DType) -> str:
        """Rows of an array."""
        axis = self.constant("axis", 0, tf.int32)
        return self.op(role, "GatherV2", table, ids, axis, Tparams=dtype, Tindices=index, Taxis=tf.int32, batch_dims=0)

    def either(self, role: str, condition: str, yes: str, no: str, dtype: tf.DType) -> str:
        """Elements of one tensor or the other."""
        return self.op(role, "SelectV2", condition, yes, no, T=dtype)

    def checked(self, size: int) -> str:
        """The ids as int32, and -1 where they are not below `size`: a lookup of -1 fails as one of the id would.

        Negative ids stay negative.
        """
        ids, dtype = self.ids, self.dtype
        bad = self.op("beyond", "GreaterEqual", ids, self.constant("rows", size, dtype), T=dtype)
        minus = self.constant("none", -1, dtype)
        ids = self.either("id", bad, minus, ids, dtype)
        if dtype != tf.int32:  # what is far below 0 would be anything in 32 bits
            ids = self.op("id", "Maximum", ids, minus, T=dtype)
        return self.cast(ids, dtype, tf.int32)


class Form(abc.ABC):
    """A compressed form of a table E (n, d).

    Attributes:
      method: its name, as an option.
      detail: its sizes, in words.
      arrays: what it stores, by role.
      size: n.
    """

    method: str
    detail: str
    arrays: dict[str, np.ndarray]
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(array.nbytes for array in self.arrays.values())

    @abc.abstractmethod
    def rows(self) -> np.ndarray:
        """All rows as a lookup gives them: (n, d) float32."""

    @abc.abstractmethod
    def lookup(self, write: Writer, stored: dict[str, str]) -> str:
        """Writes a lookup.

        Args:
          write: has the ids.
          stored: role -> reference to the array.

        Returns:
          The reference to the rows: (*shape of the ids, d) float32.
        """


def lost(table: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> float:
    """The share of the squares of a table that other rows miss, each row (n,) weighted as it is read."""
    total = float(weights @ np.square(table, dtype=np.float64).sum(axis=1))
    missed = float(weights @ np.square(table.astype(np.float64) - rows).sum(axis=1))
    return missed / total if total else float(missed > 0)


def replace(model: Model, table: Table, form: Form) -> None:
    """Puts a form in the place of a table, for all its lookups, in place."""
    graph = model.graph
    tensors = infer_tensors(graph, model.library())
    stored = {role: graph.add_constant(f"{table.name}/{role}", array) for role, array in form.arrays.items()}
    for name, ids in zip(table.lookups, table.ids, strict=True):
        node = graph.nodes[name]
        write = Writer(graph, f"{name}/{form.method}", ids, tensors)
        if node.op == "MatMul":
            _one_hot(write, node, form, stored)
            continue
        rows = form.lookup(write, stored)
        if node.op in _GATHERS:
            graph.redirect(name, rows)
            graph.redirect_control(name, [split(rows)[0]])
        else:
            dtype = write.dtype
            total = write.op("count", "Size", ids, T=dtype, out_type=dtype)
            zero, one = write.constant("zero", 0, dtype), write.constant("one", 1, dtype)
            graph.set_inputs(name, [rows, write.op("all", "Range", zero, total, one, Tidx=dtype), *node.input[2:]])
    graph.sweep()


def _one_hot(write: Writer, node: NodeDef, form: Form, stored: dict[str, str]) -> None:
    """[0 <= i < n] E[i] in the place of onehot(i) E."""
    graph = write.graph
    ids = write.ids
    dtype = write.dtype if write.dtype in (tf.int32, tf.int64) else tf.int32  # OneHot takes uint8 too
    write.ids, write.dtype = write.cast(ids, write.dtype, dtype), dtype
    inside = write.constant("zero", 0, dtype), write.constant("last", form.size - 1, dtype)
    low = write.op("from", "Maximum", write.ids, inside[0], T=dtype)
    near = write.op("near", "Minimum", low, inside[1], T=dtype)
    same = write.op("known", "Equal", near, write.ids, T=dtype)
    number = write.cast(same, tf.bool, tf.float32)
    factor = write.op("factor", "ExpandDims", number, write.constant("axis", -1, tf.int32), T=tf.float32, Tdim=tf.int32)
    write.ids = near
    rows = form.lookup(write, stored)
    control = [ref for ref in node.input if ref.startswith("^")]
    graph.replace(make_node(node.name, "Mul", [rows, factor, *control], T=tf.float32))
