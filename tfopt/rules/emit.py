"""The edits of a finished plan, on constants that have been checked.

s * x + t becomes nothing, a Mul, a bias, Sub(t, x) where s = -1, or a Mul and an AddV2; weights become new constants.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import make_node
from tfopt.rewrite import Refused, remove_node
from tfopt.rules.affine import Unit, is_one
from tfopt.rules.coefficients import compact, varying, vector_of
from tfopt.rules.constants import attr
from tfopt.rules.view import View

# Linear ops whose runtime kernels fuse a BiasAdd that comes right after them.
BIAS_ADD_OPS = frozenset(
    ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2", "MatMul")
)

Edge = tuple[str, int]  # (node, input index)
Edit = Callable[[], None]


def check_removable(view: View, name: str) -> None:
    """Refuses to take a node out that control edges hold in its place."""
    graph, node = view.graph, view.graph.nodes[name]
    if graph.control_inputs(node):
        raise Refused(f"{node.op} {name!r} has control edges")
    if name in graph.keep:
        raise Refused(f"{node.op} {name!r} must be kept")
    producer = graph.producer(graph.data_inputs(node)[0])
    if producer.op in ("Switch", "RefSwitch") and any(port == -1 for _, _, port in graph.uses(name)):
        raise Refused(f"{node.op} {name!r} holds the control edges of a v1 branch")


def remove_identity(view: View, unit: Unit) -> None:
    """Takes a node out that neither scales nor shifts.

    Raises:
      Refused: control edges hold it.
    """
    check_removable(view, unit.node)
    remove(view, unit)()


def settle_bias(view: View, unit: Unit) -> bool:
    """Writes the bias of a linear op as a BiasAdd; returns whether it could."""
    graph = view.graph
    node = graph.nodes[unit.node]
    new = shift_node(view, unit.node, unit.x, unit.shift.astype(tf.as_dtype(attr(node, "T").type).as_numpy_dtype))
    if new.op != "BiasAdd":
        return False
    new.input.extend(f"^{name}" for name in graph.control_inputs(node))
    graph.replace(new)
    return True


def write(view: View, source: str, array: np.ndarray, edges: list[Edge]) -> Edit:
    """New values for a constant, on the given edges."""

    def edit() -> None:
        ref = view.add_constant(f"{source.removesuffix('/folded')}/folded", array)
        for name, index in edges:
            view.graph.set_input(name, index, ref)

    return edit


def remove(view: View, unit: Unit) -> Edit:
    """Takes the node of a unit out."""

    def edit() -> None:
        node = view.graph.nodes[unit.node]
        # Another edit of the same plan may have given the node another operand since.
        x = next(ref for ref in node.input if view.value(ref) is None)
        remove_node(view.graph, unit.node, x)

    return edit


def emit(view: View, unit: Unit, scale: np.ndarray, shift: np.ndarray) -> Edit:
    """Writes the node of a unit anew, with the scale and shift in the dtype of the graph."""

    def edit() -> None:
        graph, node = view.graph, view.graph.nodes[unit.node]
        x = next(ref for ref in node.input if view.value(ref) is None)
        dtype = tf.as_dtype(attr(node, "T").type)
        if unit.scales and unit.shifts and is_one(-unit.scale):
            new = make_node(unit.node, "Sub", [_constant(view, unit.node, shift), x], T=dtype)
        elif unit.shifts:
            if unit.scales:
                scaled = graph.add_op(
                    f"{unit.node}/scale", "Mul", [x, _constant(view, f"{unit.node}/scale", scale)], T=dtype
                )
                view.shapes[scaled] = view.shape(x)
                x = scaled
            new = shift_node(view, unit.node, x, shift)
        else:
            new = make_node(unit.node, "Mul", [x, _constant(view, unit.node, scale)], T=dtype)
        new.input.extend(f"^{name}" for name in graph.control_inputs(node))
        graph.replace(new)

    return edit


def add_bias(view: View, name: str, bias: np.ndarray) -> Edit:
    """Adds a bias after a linear op, for all who read its result."""

    def edit() -> None:
        graph = view.graph
        uses = [(user, index) for user, index, port in graph.uses(name) if port == 0]
        labels = [label for label, ref in graph.outputs.items() if ref == name]
        node = shift_node(view, graph.unique_name(f"{name}/bias"), name, bias)
        graph.add(node)
        view.shapes[node.name] = view.shape(name)
        for user, index in uses:
            graph.set_input(user, index, node.name)
        for label in labels:
            graph.outputs[label] = node.name

    return edit


def shift_node(view: View, name: str, x: str, shift: np.ndarray) -> NodeDef:
    """A node that adds a coefficient: BiasAdd right after an op that fuses it, AddV2 elsewhere."""
    producer = view.graph.producer(x)
    shape = view.shape(x)
    dtype = tf.as_dtype(shift.dtype)
    if producer.op in BIAS_ADD_OPS and shape is not None:
        layout = attr(producer, "data_format").s.decode() or "NHWC"
        axis = 1 if layout.startswith("NC") else len(shape) - 1
        size = shape[axis]
        if size is not None and all(a == axis for a in varying(shift)):
            vector = vector_of(shift, axis, size).astype(shift.dtype)
            bias = view.add_constant(f"{name}/k", vector)
            return make_node(
                name, "BiasAdd", [x, bias], T=dtype, data_format="NCHW" if axis == 1 < len(shape) - 1 else "NHWC"
            )
    return make_node(name, "AddV2", [x, _constant(view, name, shift)], T=dtype)


def _constant(view: View, hint: str, k: np.ndarray) -> str:
    return view.add_constant(f"{hint}/k", compact(k))
