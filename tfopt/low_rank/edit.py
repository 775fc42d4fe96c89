"""Puts factors in the place of a layer: its last op keeps the name that others refer to, and the control edges.

    product        MatMul(MatMul(x, U), V), the same with BatchMatMul; Einsum twice
    lookup         MatMul(Gather(A, ids), B)
    convolution    svd      kernel of the layer to r channels, 1x1
                   tucker   1x1, kernel of the layer from r to s channels, 1x1
                   cp       1x1, depthwise kx1, depthwise 1xk (or one depthwise kxk), 1x1
                   spatial  kx1, 1xk

Strides, dilations and padding go with the rows and columns of the kernel. Zeros that padding adds stay zeros through a
1x1 convolution, so it may come before.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, make_node, set_attr
from tfopt.low_rank.factors import Factors
from tfopt.low_rank.layers import Layer
from tfopt.rules.constants import attr

_BOTH = (True, True)
_NEITHER = (False, False)


def replace(graph: Graph, layer: Layer, factors: Factors) -> None:
    """Writes a layer as its factors, in place; nodes that shared the weight share the factors.

    Args:
      graph: the main body.
      layer: of this graph.
      factors: of its kernel.
    """
    arrays = [array.astype(np.float32) for array in factors.arrays]
    if layer.kind == "convolution":
        kernels = _kernels(layer, factors.method, arrays)
        refs = _constants(graph, layer, [kernel for kernel, _, _ in kernels])
        for name in layer.nodes:
            _convolution(graph, graph.nodes[name], [(ref, *k[1:]) for ref, k in zip(refs, kernels, strict=True)])
        return
    first, second = (array.reshape(-1, array.shape[-1]) for array in arrays)
    if layer.kind == "lookup":
        refs = _constants(graph, layer, [first, second])
        for name in layer.nodes:
            _lookup(graph, graph.nodes[name], refs)
        return
    node = graph.nodes[layer.nodes[0]]
    if node.op == "Einsum":
        _, of_w, of_out = layer.labels
        sizes = dict(zip(of_w, layer.shape, strict=True))
        inner = [sizes[label] for label in of_w if label not in of_out]
        outer = [sizes[label] for label in of_w if label in of_out]
        refs = _constants(graph, layer, [first.reshape(*inner, -1), second.reshape(-1, *outer)])
    else:
        lead = (1,) * (len(layer.labels[1]) - 2)
        if layer.index == 0:
            first, second = first.T, second.T
        refs = _constants(graph, layer, [first.reshape(*lead, *first.shape), second])
    for name in layer.nodes:
        _product(graph, graph.nodes[name], layer, refs)


def _constants(graph: Graph, layer: Layer, arrays: list[np.ndarray]) -> list[str]:
    return [graph.add_constant(f"{layer.weight}/factor_{i}", array) for i, array in enumerate(arrays, 1)]


def _like(node: NodeDef, name: str, op: str, inputs: list[str], **changes: object) -> NodeDef:
    """A node with the attributes of another one, but for some."""
    made = make_node(name, op, inputs)
    for key, value in node.attr.items():
        made.attr[key].CopyFrom(value)
    for key, value in changes.items():
        made.attr.pop(key, None)
        if value != []:  # which is the default of every list
            set_attr(made, key, value)
    return made


def _finish(graph: Graph, last: NodeDef, replaced: NodeDef) -> None:
    last.input.extend(f"^{name}" for name in graph.control_inputs(replaced))
    graph.replace(last)


def _product(graph: Graph, node: NodeDef, layer: Layer, refs: list[str]) -> None:
    x = graph.data_inputs(node)[1 - layer.index]
    hint = graph.unique_name(f"{node.name}/reduced")
    if node.op == "Einsum":
        of_x, of_w, of_out = layer.labels
        rank = next(letter for letter in "rstuvwxyzabcdefghijklmnopq" if letter not in of_x + of_w + of_out)
        inner = "".join(label for label in of_w if label not in of_out)
        outer = "".join(label for label in of_w if label in of_out)
        rest = "".join(label for label in of_x if label not in of_w)
        equations = f"{of_x},{inner}{rank}->{rest}{rank}", f"{rest}{rank},{rank}{outer}->{of_out}"
        reduced = graph.add(_like(node, hint, node.op, [x, refs[0]], equation=equations[0]))
        _finish(graph, _like(node, node.name, node.op, [reduced, refs[1]], equation=equations[1]), node)
        return
    turned = ("transpose_a", "transpose_b") if node.op == "MatMul" else ("adj_x", "adj_y")
    own = {turned[layer.index]: False}
    neither = dict.fromkeys(turned, False)
    order = [x, refs[0]] if layer.index else [refs[0], x]
    reduced = graph.add(_like(node, hint, node.op, order, **own))
    order = [reduced, refs[1]] if layer.index else [refs[1], reduced]
    _finish(graph, _like(node, node.name, node.op, order, **neither), node)


def _lookup(graph: Graph, node: NodeDef, refs: list[str]) -> None:
    rest = graph.data_inputs(node)[1:]
    reduced = graph.add(_like(node, graph.unique_name(f"{node.name}/reduced"), node.op, [refs[0], *rest]))
    last = make_node(node.name, "BatchMatMulV2", [reduced, refs[1]], T=tf.float32, adj_x=False, adj_y=False)
    _finish(graph, last, node)


_Step = tuple[np.ndarray, str, tuple[bool, bool]]  # kernel, op, whether it takes over the rows and the columns


def _kernels(layer: Layer, method: str, arrays: list[np.ndarray]) -> list[_Step]:
    """The convolutions in the place of one."""
    if method == "svd":
        first, second = arrays
        return [(first.reshape(*layer.kernel.shape[:3], -1), "Conv2D", _BOTH), (second[None, None], "Conv2D", _NEITHER)]
    if method == "tucker":
        inner, core, outer = arrays
        ends = [(end[None, None], "Conv2D", _NEITHER) for end in (inner, outer)]
        return [ends[0], (core, "Conv2D", _BOTH), ends[1]]
    if method == "spatial":
        high, wide = arrays
        return [(high[:, None], "Conv2D", (True, False)), (wide[None], "Conv2D", (False, True))]
    inner, high, wide, outer = arrays
    depthwise = "DepthwiseConv2dNative"
    middle: list[_Step] = [
        (high[:, None, :, None], depthwise, (True, False)),
        (wide[None, :, :, None], depthwise, (False, True)),
    ]
    if layer.one_depthwise():
        middle = [(np.einsum("xr,yr->xyr", high, wide)[..., None], depthwise, _BOTH)]
    return [(inner[None, None], "Conv2D", _NEITHER), *middle, (outer[None, None], "Conv2D", _NEITHER)]


def _convolution(graph: Graph, node: NodeDef, steps: list[tuple[str, str, tuple[bool, bool]]]) -> None:
    x = graph.data_inputs(node)[0]
    for number, (ref, op, axes) in enumerate(steps, 1):
        last = number == len(steps)
        name = node.name if last else graph.unique_name(f"{node.name}/part_{number}")
        made = _like(node, name, op, [x, ref], **_window(node, axes))
        if op != "Conv2D":
            made.attr.pop("use_cudnn_on_gpu", None)
        if last:
            _finish(graph, made, node)
        else:
            x = graph.add(made)


def _window(node: NodeDef, axes: tuple[bool, bool]) -> dict[str, object]:
    """Strides, dilations and padding of a convolution that takes over the rows, the columns, both or neither."""
    first = 2 if attr(node, "data_format").s == b"NCHW" else 1
    places = {first: axes[0], first + 1: axes[1]}
    changes: dict[str, object] = {}
    for key in ("strides", "dilations"):
        values = list(attr(node, key).list.i) or [1] * 4
        changes[key] = [value if places.get(axis, True) else 1 for axis, value in enumerate(values)]
    padding = attr(node, "padding").s.decode()
    if padding == "EXPLICIT":
        pads = list(attr(node, "explicit_paddings").list.i)
        pads = [pad if places.get(axis // 2, True) else 0 for axis, pad in enumerate(pads)]
        if any(pads):
            changes["explicit_paddings"] = pads
        else:
            changes |= {"padding": "VALID", "explicit_paddings": []}
    elif axes == _NEITHER:
        changes["padding"] = "VALID"
    return changes
