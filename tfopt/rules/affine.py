"""Recognising affine nodes: s * x + t, with constants s and t that do not make x larger.

    Mul(x, c)     s = c                  Sub(x, c)     t = -c             FusedBatchNorm*(x, gamma, beta, mean, var):
    AddV2(x, c)   t = c                  Sub(c, x)     s = -1, t = c      s = gamma / sqrt(var + epsilon)
    RealDiv(x, c) s = 1 / c              BiasAdd(x, c) t = c              t = beta - mean * s
    Neg(x)        s = -1

Constants are values of the graph, or expressions over them (the Rsqrt chain of a batch norm that nobody folded yet).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, Shape, join, split
from tfopt.rules.coefficients import along, canonical, divide, fits, raised, times

FLOATS = (tf.float32.as_datatype_enum, tf.float64.as_datatype_enum)
BATCH_NORMS = frozenset(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"))
AFFINE_OPS = BATCH_NORMS | {"Mul", "Add", "AddV2", "Sub", "RealDiv", "Div", "BiasAdd", "BiasAddV1", "Neg"}
IDENTITIES = frozenset(("Identity", "Snapshot", "StopGradient", "PreventGradient"))

# Constant expressions are evaluated this deep: a batch norm's chain has 8 ops.
MAX_DEPTH = 24

# Steps for unusually long travels, in all.
RESERVE = 20_000

# Larger expressions are left to constant folding, which weighs what the model would gain.
MAX_EXPRESSION_BYTES = 65536


_UNSET = AttrValue()


def attr(node: NodeDef, key: str) -> AttrValue:
    """An attribute of a node, empty where it is not set (indexing the node's own map would set it)."""
    return node.attr.get(key, _UNSET)


def _squeeze(node: NodeDef, a: np.ndarray) -> np.ndarray:
    return np.squeeze(a, tuple(attr(node, "squeeze_dims").list.i) or None)


# Ops of constant expressions; float results keep the dtype of their operands, as TensorFlow's would.
_CONSTANT_OPS: dict[str, Callable[..., np.ndarray]] = {
    "Identity": lambda node, a: a,
    "Mul": lambda node, a, b: np.multiply(a, b),
    "Add": lambda node, a, b: np.add(a, b),
    "AddV2": lambda node, a, b: np.add(a, b),
    "Sub": lambda node, a, b: np.subtract(a, b),
    "RealDiv": lambda node, a, b: np.true_divide(a, b),
    "Neg": lambda node, a: np.negative(a),
    "Cast": lambda node, a: a.astype(tf.as_dtype(attr(node, "DstT").type).as_numpy_dtype),
    "Sqrt": lambda node, a: np.sqrt(a),
    "Rsqrt": lambda node, a: (1 / np.sqrt(a, dtype=np.float64)).astype(a.dtype),
    "Square": lambda node, a: np.square(a),
    "Reshape": lambda node, a, shape: a.reshape(tuple(shape.ravel())),
    "ExpandDims": lambda node, a, axis: np.expand_dims(a, int(axis)),
    "Squeeze": _squeeze,
    "Transpose": lambda node, a, order: np.transpose(a, order),
    "Pack": lambda node, *parts: np.stack(parts, attr(node, "axis").i),
    "ConcatV2": lambda node, *parts: np.concatenate(parts[:-1], int(parts[-1])),
}


@dataclasses.dataclass(frozen=True)
class Unit:
    """One affine node: y = scale * x + shift.

    Attributes:
      node: its name.
      x: the reference to the varying operand.
      scale: coefficient of x.
      shift: coefficient that is added.
    """

    node: str
    x: str
    scale: np.ndarray
    shift: np.ndarray

    @property
    def scales(self) -> bool:
        """Whether the scale is anything but 1."""
        return not is_one(self.scale)

    @property
    def shifts(self) -> bool:
        """Whether the shift is anything but 0."""
        return not is_zero(self.shift)


def is_one(k: np.ndarray) -> bool:
    """Whether a scale is the identity, up to rounding in float64."""
    return k.ndim == 0 and bool(abs(k - 1) < 1e-12)


def is_zero(k: np.ndarray) -> bool:
    """Whether a shift is the identity."""
    return k.ndim == 0 and bool(k == 0)


class View:
    """A graph as the affine rules see it: its constants and shapes.

    Attributes:
      graph: the body.
      shapes: reference -> static shape, kept up to date by those who add nodes.
      protected: node -> why its constants must stay as they are.
      reserve: how many steps are left for affines that travel unusually far.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, Shape], protected: Mapping[str, str] | None = None):
        self.graph = graph
        self.shapes = dict(shapes)
        self.protected = protected or {}
        self.reserve = RESERVE
        self._values: dict[str, np.ndarray | None] = {}
        self._units: dict[tuple[str, ...], Unit | None] = {}
        self._written: dict[tuple, str] = {}

    def add_constant(self, hint: str, array: np.ndarray) -> str:
        """Adds a constant, or finds the equal one that was added before; returns the reference."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.shape, array.dtype.str, hashlib.blake2b(array.data).digest())
        ref = self._written.get(key)
        if ref is None or ref not in self.graph.nodes:
            ref = self._written[key] = self.graph.add_constant(hint, array)
            self.shapes[ref] = array.shape
        return ref

    def forget(self) -> None:
        """Drops what was evaluated: to be called when nodes have gone, whose names may be used again."""
        self._values.clear()
        self._units.clear()
        self._written.clear()

    def shape(self, ref: str) -> Shape:
        """The static shape of a reference; None where its rank is unknown."""
        return self.shapes.get(join(*split(ref)))

    def rank(self, ref: str) -> int | None:
        """The rank of a reference; None where it is unknown."""
        shape = self.shape(ref)
        return None if shape is None else len(shape)

    def value(self, ref: str, depth: int = 0) -> np.ndarray | None:
        """The value of a reference that is constant, or an expression over constants; None if it varies."""
        if ref in self._values:
            return self._values[ref]
        value = self.graph.constant(ref)
        if value is None and depth < MAX_DEPTH:
            node = self.graph.producer(ref)
            compute = _CONSTANT_OPS.get(node.op)
            if compute is not None and split(ref)[1] == 0 and not any(r.startswith("^") for r in node.input):
                operands = []
                for operand in node.input:
                    operands.append(self.value(operand, depth + 1))
                    if operands[-1] is None:
                        break
                else:
                    with np.errstate(all="ignore"):
                        value = np.asarray(compute(node, *operands))
        self._values[ref] = value
        return value

    def unit(self, node: NodeDef) -> Unit | None:
        """The node as an affine unit; None if it is not one. Identities are recognised in every dtype."""
        if node.op not in AFFINE_OPS:
            return None
        key = (node.name, node.op, *node.input)
        if key not in self._units:
            self._units[key] = self._read(node)
        return self._units[key]

    def _read(self, node: NodeDef) -> Unit | None:
        with np.errstate(all="ignore"):
            unit = self._batch_norm(node) if node.op in BATCH_NORMS else self._elementwise(node)
        if unit is None or not (np.isfinite(unit.scale).all() and np.isfinite(unit.shift).all()):
            return None
        if attr(node, "T").type not in FLOATS and (unit.scales or unit.shifts):
            return None
        return unit

    def fold_expressions(self) -> None:
        """Writes small constant expressions as constants, so that rules see them as such."""
        for node in list(self.graph.nodes.values()):
            if not node.input or self.value(node.name) is not None:
                continue
            for index, ref in enumerate(self.graph.data_inputs(node)):
                value = self.value(ref)
                if value is None or self.graph.constant(ref) is not None or value.nbytes > MAX_EXPRESSION_BYTES:
                    continue
                self.graph.set_input(node.name, index, self.add_constant(split(ref)[0], value))
        self.graph.sweep()
        self.forget()

    def _elementwise(self, node: NodeDef) -> Unit | None:
        refs = self.graph.data_inputs(node)
        if node.op == "Neg":
            return Unit(node.name, refs[0], np.float64(-1) * np.ones(()), np.zeros(()))
        values = [self.value(ref) for ref in refs]
        if (values[0] is None) == (values[1] is None):
            return None
        index = 0 if values[0] is None else 1
        x, c = refs[index], values[1 - index]
        assert c is not None
        if c.dtype.kind not in "fiu":
            return None
        if node.op.startswith("BiasAdd"):
            k = self._per_channel(node, x, c)
            return None if k is None else Unit(node.name, x, np.ones(()), k)
        shape = self.shape(x)
        if not fits(c.shape, shape):
            return None
        k = raised(c, None if shape is None else len(shape))
        one, zero = np.ones(()), np.zeros(())
        if node.op == "Mul":
            return Unit(node.name, x, k, zero)
        if node.op in ("Add", "AddV2"):
            return Unit(node.name, x, one, k)
        if node.op == "Sub":
            return Unit(node.name, x, one, canonical(-k)) if index == 0 else Unit(node.name, x, -one, k)
        if index == 0 and (node.op == "RealDiv" or attr(node, "T").type in FLOATS):
            return Unit(node.name, x, canonical(1 / k), zero)
        return None

    def _batch_norm(self, node: NodeDef) -> Unit | None:
        refs = self.graph.data_inputs(node)
        values = [self.value(ref) for ref in refs[1:5]]
        name = node.name
        if self.trains(node) or any(v is None for v in values) or not values[3].size:  # type: ignore[union-attr]
            return None
        if any(port > 0 for _, _, port in self.graph.uses(name)) or any(
            split(ref)[0] == name and split(ref)[1] > 0 for ref in self.graph.outputs.values()
        ):
            return None
        gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
        scale = gamma / np.sqrt(variance + (attr(node, "epsilon").f if "epsilon" in node.attr else 1e-4))
        s, t = (self._per_channel(node, refs[0], v) for v in (scale, beta - mean * scale))
        return None if s is None or t is None else Unit(name, refs[0], s, t)

    def trains(self, node: NodeDef) -> bool:
        """Whether a fused batch norm uses the statistics of its own batch (the default of the attribute is true)."""
        return node.op in BATCH_NORMS and (attr(node, "is_training").b if "is_training" in node.attr else True)

    def _per_channel(self, node: NodeDef, x: str, vector: np.ndarray) -> np.ndarray | None:
        """A vector along the channel axis of x; the rank of a fused batch norm follows from its layout if need be."""
        layout = attr(node, "data_format").s.decode() or "NHWC"
        rank = self.rank(x)
        if rank is None and node.op in BATCH_NORMS:
            rank = len(layout)
        if rank is None:
            return None
        axis = 1 if layout.startswith("NC") else rank - 1
        return along(vector, axis, rank)


def moved(unit: Unit, k_in: np.ndarray, k_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) of a unit whose operand became k_in * x and whose result must become k_out * y."""
    return canonical(times(unit.scale, divide(k_out, k_in))), canonical(times(unit.shift, k_out))


def shifted(unit: Unit, t_in: np.ndarray, t_out: np.ndarray) -> np.ndarray:
    """The shift of a unit whose operand became x + t_in and whose result must become y + t_out."""
    with np.errstate(all="ignore"):
        return canonical(unit.shift + t_out - times(unit.scale, t_in))
