"""Recognising affine nodes: s * x + t, with constants s and t that do not make x larger.

    Mul(x, c)     s = c                  Sub(x, c)     t = -c             FusedBatchNorm*(x, gamma, beta, mean, var):
    AddV2(x, c)   t = c                  Sub(c, x)     s = -1, t = c      s = gamma / sqrt(var + epsilon)
    RealDiv(x, c) s = 1 / c              BiasAdd(x, c) t = c              t = beta - mean * s
    Neg(x)        s = -1

Constants are values of the graph, or expressions over them (the Rsqrt chain of a batch norm that nobody folded yet).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import split
from tfopt.rules.coefficients import along, canonical, fits, raised, times
from tfopt.rules.constants import attr

if TYPE_CHECKING:
    from tfopt.rules.view import View

FLOATS = (tf.float32.as_datatype_enum, tf.float64.as_datatype_enum)
BATCH_NORMS = frozenset(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"))
AFFINE_OPS = BATCH_NORMS | {"Mul", "Add", "AddV2", "Sub", "RealDiv", "Div", "BiasAdd", "BiasAddV1", "Neg"}


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


def read(view: View, node: NodeDef) -> Unit | None:
    """A node of AFFINE_OPS as an affine unit; None if it is not one. Identities are recognised in every dtype."""
    with np.errstate(all="ignore"):
        unit = _batch_norm(view, node) if node.op in BATCH_NORMS else _elementwise(view, node)
    if unit is None or not (np.isfinite(unit.scale).all() and np.isfinite(unit.shift).all()):
        return None
    if attr(node, "T").type not in FLOATS and (unit.scales or unit.shifts):
        return None
    return unit


def _elementwise(view: View, node: NodeDef) -> Unit | None:
    refs = view.graph.data_inputs(node)
    if node.op == "Neg":
        return Unit(node.name, refs[0], np.float64(-1) * np.ones(()), np.zeros(()))
    values = [view.value(ref) for ref in refs]
    if (values[0] is None) == (values[1] is None):
        return None
    index = 0 if values[0] is None else 1
    x, c = refs[index], values[1 - index]
    assert c is not None
    if c.dtype.kind not in "fiu":
        return None
    if node.op.startswith("BiasAdd"):
        k = _per_channel(view, node, x, c) if index == 0 else None
        return None if k is None else Unit(node.name, x, np.ones(()), k)
    shape = view.shape(x)
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


def _batch_norm(view: View, node: NodeDef) -> Unit | None:
    refs = view.graph.data_inputs(node)
    values = [view.value(ref) for ref in refs[1:5]]
    name = node.name
    if trains(node) or any(v is None for v in values) or not values[3].size:  # type: ignore[union-attr]
        return None
    if any(port > 0 for _, _, port in view.graph.uses(name)) or any(
        split(ref)[0] == name and split(ref)[1] > 0 for ref in view.graph.outputs.values()
    ):
        return None
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    scale = gamma / np.sqrt(variance + (attr(node, "epsilon").f if "epsilon" in node.attr else 1e-4))
    s, t = (_per_channel(view, node, refs[0], v) for v in (scale, beta - mean * scale))
    return None if s is None or t is None else Unit(name, refs[0], s, t)


def trains(node: NodeDef) -> bool:
    """Whether a fused batch norm uses the statistics of its own batch (the default of the attribute is true)."""
    return node.op in BATCH_NORMS and (attr(node, "is_training").b if "is_training" in node.attr else True)


def _per_channel(view: View, node: NodeDef, x: str, vector: np.ndarray) -> np.ndarray | None:
    """A vector along the channel axis of x; the rank of a fused batch norm follows from its layout if need be."""
    layout = attr(node, "data_format").s.decode() or "NHWC"
    rank = view.rank(x)
    if rank is None and node.op in BATCH_NORMS:
        rank = len(layout)
    if rank is None:
        return None
    axis = 1 if layout.startswith("NC") else rank - 1
    return along(vector, axis, rank)


def shifted(unit: Unit, t_in: np.ndarray, t_out: np.ndarray) -> np.ndarray:
    """The shift of a unit whose operand became x + t_in and whose result must become y + t_out."""
    with np.errstate(all="ignore"):
        return canonical(unit.shift + t_out - times(unit.scale, t_in))
