"""The layers of a graph that can be factored, each as a kernel W[x, y, i, o], and what it costs whole and in factors.

    product       y = x W: MatMul, BatchMatMul, Einsum           W[1, 1, i, o], i all that is summed over
    convolution   Conv2D without groups                          W[x, y, i, o]
    lookup        y = W[ids]: GatherV2                           W[1, 1, row, o]

Of each position a kernel costs as many multiplications as it has elements; the factors of a convolution with strides
work at different numbers of positions.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import WEIGHT_ELEMENTS, Graph, Shape, infer_shapes, split
from tfopt.model import Model
from tfopt.rewrite import Log, Refused
from tfopt.rules.channels import CALLS, CONVOLUTIONS, LOOKUPS, PRODUCTS
from tfopt.rules.constants import attr
from tfopt.rules.labels import product_labels
from tfopt.rules.view import View

RULE = "low rank"
FEW_CHANNELS = 4  # a first convolution that reads no more is left alone, unless the owner wants it
MAX_ELEMENTS = 1 << 27


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the factors of a layer work.

    Attributes:
      before, between, after: positions that a factor reads or writes: those of the input, those of the output by
        rows and of the input by columns, those of the output. All are the same but for convolutions.
      strides, dilations: by rows and columns.
    """

    before: int = 1
    between: int = 1
    after: int = 1
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight that can be factored.

    Attributes:
      weight: the node that holds it.
      nodes: the ops that read it; several where signatures, or several places of a graph, share it.
      kind: "product", "convolution" or "lookup".
      kernel: (x, y, i, o).
      geometry: of each node, at batch 1.
      sized: whether the shapes are known; where not, each factor is taken to work once.
      labels: of a product: the axes of (x, W, result), as in an einsum.
      shape, order: of a product: of the weight, and its axes in the order in which the kernel has them.
      index: which operand the weight is.
    """

    weight: str
    nodes: tuple[str, ...]
    kind: str
    kernel: np.ndarray
    geometry: tuple[Geometry, ...]
    sized: bool = True
    labels: tuple[str, str, str] = ("", "", "")
    shape: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    index: int = 1

    def restored(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel (x, y, i, o) in the axes of the weight."""
        if self.kind != "product":
            return kernel.reshape(self.kernel.shape[2:] if self.kind == "lookup" else self.kernel.shape)
        moved = kernel.reshape([self.shape[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order))

    def methods(self) -> tuple[str, ...]:
        """The methods that fit its shape."""
        if self.kind != "convolution" or self.kernel.shape[:2] == (1, 1):
            return ("svd",)
        found = ["svd", "tucker"]
        if self.geometry[0].dilations == (1, 1):  # the depthwise kernel has no dilations on a CPU
            found.append("cp")
        if min(self.kernel.shape[:2]) > 1:
            found.append("spatial")
        return tuple(found)

    def one_depthwise(self) -> bool:
        """Whether cp has one depthwise convolution: the kernel has one row or column, or strides (TensorFlow wants
        those of depthwise convolutions to be equal)."""
        return min(self.kernel.shape[:2]) == 1 or self.geometry[0].strides != (1, 1)

    def macs(self, method: str = "", ranks: tuple[int, ...] = ()) -> int:
        """Multiply-accumulates of a row, of the layer as it is or in factors."""
        return sum(self._macs(each, method, ranks) for each in self.geometry)

    def _macs(self, at: Geometry, method: str, ranks: tuple[int, ...]) -> int:
        x, y, i, o = self.kernel.shape
        if not method:
            return 0 if self.kind == "lookup" else at.after * x * y * i * o
        r, s = ranks[0], ranks[-1]
        if self.kind == "lookup":
            return at.after * r * o
        if method == "svd":
            return at.after * (x * y * i * r + r * o)
        if method == "tucker":
            return at.before * i * r + at.after * (x * y * r * s + s * o)
        if method == "spatial":
            return at.between * x * i * r + at.after * y * r * o
        middle = at.after * x * y * r if self.one_depthwise() else at.between * x * r + at.after * y * r
        return at.before * i * r + middle + at.after * r * o

    def elements(self, method: str = "", ranks: tuple[int, ...] = ()) -> int:
        """Weights of the layer as it is, or in factors."""
        x, y, i, o = self.kernel.shape
        if not method:
            return self.kernel.size
        r, s = ranks[0], ranks[-1]
        if method == "svd":
            return r * (x * y * i + o)
        if method == "tucker":
            return i * r + x * y * r * s + s * o
        if method == "spatial":
            return r * (x * i + y * o)
        return r * (i + (x * y if self.one_depthwise() else x + y) + o)


def find(model: Model, log: Log, keep: set[str], keep_first: bool) -> list[Layer]:
    """The layers of the main body that can be factored, in the order of the computation.

    Args:
      model: left as it is.
      log: gets the weights that cannot be factored, with the reason.
      keep: nodes whose weights stay as they are.
      keep_first: whether a convolution that reads a few channels stays.
    """
    graph = model.graph
    view = View(graph, shapes_of_a_row(model))
    readers: dict[str, list[tuple[NodeDef, int]]] = {}
    for node in graph.topological():
        if node.op in (*PRODUCTS, *CONVOLUTIONS, *LOOKUPS, *CALLS):
            for index, ref in enumerate(graph.data_inputs(node)):
                weight = _source(graph, ref)
                if weight is not None:
                    readers.setdefault(weight, []).append((node, index))
    layers = []
    for weight, uses in readers.items():
        value = graph.constant(weight)
        if value is None or value.ndim < 2 or value.size < WEIGHT_ELEMENTS or value.dtype.kind in "iubOSU":
            continue  # tiny: too little to be won, and constants of the graph that are no weights
        try:
            layers.append(_layer(view, weight, value, uses, keep, keep_first))
        except Refused as reason:
            log.refused[RULE, weight] = str(reason)
    return layers


def shapes_of_a_row(model: Model) -> dict[str, Shape]:
    """Static shapes of all tensors when the signatures are given one row; see `tfopt.cost`."""
    graph = model.graph.copy()
    for name in graph.arguments:
        node = graph.nodes.get(name)
        if node is not None and node.op == "Placeholder" and name not in graph.weights:
            dims = node.attr["shape"].shape.dim
            if dims and dims[0].size < 0:
                dims[0].size = 1
    return infer_shapes(graph, model.library())


def _source(graph: Graph, ref: str) -> str | None:
    """The node that holds a constant, seen through Identity; None where a reference varies."""
    if graph.constant(ref) is None:
        return None
    name = split(ref)[0]
    while name not in graph.weights and graph.nodes[name].op == "Identity":
        name = split(graph.nodes[name].input[0])[0]
    return name


def _layer(
    view: View, weight: str, value: np.ndarray, uses: list[tuple[NodeDef, int]], keep: set[str], keep_first: bool
) -> Layer:
    graph, (node, index) = view.graph, uses[0]
    if value.dtype != np.float32:
        raise Refused(f"it is {value.dtype}, not float32")
    if not np.isfinite(value).all():
        raise Refused("it is not finite")
    if value.size > MAX_ELEMENTS:
        raise Refused(f"it has {value.size:,} elements: too many to decompose")
    if kept := [each.name for each, _ in uses if each.name in keep]:
        raise Refused(f"{kept[0]!r} stays as keep wants it")
    for each, _ in uses:
        if each.op in CALLS:
            raise Refused(f"{each.op} {each.name!r} reads it: what loops and branches compute is not factored")
    _check_readers(graph, weight, [each.name for each, _ in uses])
    for other, position in uses[1:]:
        if other.op != node.op or position != index or not _alike(other, node):
            raise Refused(f"{node.op} {node.name!r} and {other.op} {other.name!r} share it, and read it differently")
    names = tuple(each.name for each, _ in uses)
    if node.op in PRODUCTS:
        return _product(view, weight, value, names, index)
    if node.op in LOOKUPS:
        return _lookup(view, weight, value, names, index)
    return _convolution(view, weight, value, names, index, keep_first)


def _alike(one: NodeDef, two: NodeDef) -> bool:
    return one.attr == two.attr if len(one.attr) == len(two.attr) else False


def _check_readers(graph: Graph, weight: str, known: list[str]) -> None:
    """Refuses a weight that others see than the nodes that are to be replaced."""
    stack = [weight]
    while stack:
        name = stack.pop()
        if graph.output_labels(name) or name in graph.keep:
            raise Refused("it is a result of the graph")
        for user, _, port in graph.uses(name):
            if port == 0 and graph.nodes[user].op == "Identity":
                stack.append(user)
            elif port == 0 and user not in known:
                raise Refused(f"{graph.nodes[user].op} {user!r} reads it too")


def _product(view: View, weight: str, value: np.ndarray, names: tuple[str, ...], index: int) -> Layer:
    found = []
    for name in names:
        node = view.graph.nodes[name]
        labels = product_labels(view, node)
        if labels is None or len(labels[index]) != value.ndim or len(view.graph.data_inputs(node)) != 2:
            raise Refused(
                f"{node.op} {name!r} is not understood: the rank of an operand is unknown, or it repeats an axis"
            )
        if len(labels[1 - index]) != (view.rank(node.input[1 - index]) or len(labels[1 - index])):
            raise Refused(f"{node.op} {name!r} is not understood: its operand has another rank than it says")
        found.append((labels[1 - index], labels[index], labels[2]))
    of_x, of_w, of_out = found[0]
    if len({each[1] for each in found}) > 1:
        raise Refused("products of different ranks share it")
    summed = [label for label in of_w if label not in of_out]
    free = [label for label in of_w if label in of_out]
    sizes = dict(zip(of_w, value.shape, strict=True))
    if any(label in of_x for label in free):
        raise Refused("it is a matrix for each element of a batch")
    if any(label not in of_x and sizes[label] != 1 for label in summed):
        raise Refused("it is summed over an axis that its operand does not have")
    if any(label not in of_w and label not in of_out for label in of_x):
        raise Refused("its operand is summed over an axis that it does not have")
    order = [of_w.index(label) for label in (*summed, *free)]
    inputs = math.prod(sizes[label] for label in summed)
    kernel = value.transpose(order).reshape(1, 1, inputs, -1)
    if min(kernel.shape[2:]) == 1:
        raise Refused("it is a vector")
    positions = []
    for name, (x_labels, _, _) in zip(names, found, strict=True):
        shape = view.shape(view.graph.nodes[name].input[1 - index])
        known = [size for label, size in zip(x_labels, shape or (), strict=False) if label not in of_w]
        if shape is not None and None not in known:
            positions.append(_everywhere(math.prod(size for size in known if size is not None)))
    sized = len(positions) == len(names)
    geometry = tuple(positions) if sized else (Geometry(),)
    return Layer(
        weight, names, "product", kernel, geometry, sized, (of_x, of_w, of_out), value.shape, tuple(order), index
    )


def _everywhere(positions: int) -> Geometry:
    return Geometry(positions, positions, positions)


def _lookup(view: View, weight: str, value: np.ndarray, names: tuple[str, ...], index: int) -> Layer:
    if index or value.ndim != 2:
        raise Refused("it is no table of vectors" if index == 0 else "it is looked up by, not in")
    positions = []
    for name in names:
        node = view.graph.nodes[name]
        axis, shape = view.value(node.input[2]), view.shape(node.input[1])
        if axis is None or int(axis) or attr(node, "batch_dims").i:
            raise Refused(f"{node.op} {name!r} does not look up its rows")
        if not shape:
            raise Refused(f"{node.op} {name!r} looks up a single row, or the rank of its ids is not known")
        if None not in shape:
            positions.append(_everywhere(math.prod(size for size in shape if size is not None)))
    sized = len(positions) == len(names)
    return Layer(
        weight, names, "lookup", value[None, None], tuple(positions) if sized else (Geometry(),), sized, index=0
    )


def _convolution(
    view: View, weight: str, value: np.ndarray, names: tuple[str, ...], index: int, keep_first: bool
) -> Layer:
    node = view.graph.nodes[names[0]]
    if node.op == "DepthwiseConv2dNative":
        raise Refused("it is depthwise: each channel has its own kernel, there is nothing to share")
    if node.op != "Conv2D" or index != 1:
        raise Refused(f"of convolutions Conv2D alone is factored, not {node.op}")
    first, channel = (2, 1) if attr(node, "data_format").s == b"NCHW" else (1, 3)
    fed = {name for name in view.graph.arguments if name not in view.graph.weights}
    geometry = []
    for name in names:
        x = view.graph.nodes[name].input[0]
        source, result = view.shape(x), view.shape(name)
        if source is None or len(source) != 4 or source[channel] != value.shape[2]:
            raise Refused("it is a grouped convolution, or the number of its channels is not known")
        if keep_first and value.shape[2] <= FEW_CHANNELS and _from(view.graph, x) & fed:
            raise Refused(
                f"it belongs to the first layer and reads {value.shape[2]} channels (keep_first=False factors it)"
            )
        strides, dilations = (
            tuple(list(attr(node, key).list.i)[first : first + 2]) or (1, 1) for key in ("strides", "dilations")
        )
        sizes = (*source[first : first + 2], *(result or (None,) * 4)[first : first + 2], source[0])
        if None not in sizes:
            high, wide, rows, columns, batch = (int(size or 0) for size in sizes)
            geometry.append(
                Geometry(batch * high * wide, batch * rows * wide, batch * rows * columns, strides, dilations)
            )
    sized = len(geometry) == len(names)
    if not sized:
        geometry = [Geometry(strides=strides, dilations=dilations)]
    return Layer(weight, names, "convolution", value, tuple(geometry), sized)


def _from(graph: Graph, ref: str) -> set[str]:
    """What a tensor is made of by ops that only move or scale: the inputs of a first layer."""
    seen: set[str] = set()
    stack = [split(ref)[0]]
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            if graph.nodes[name].op not in (*PRODUCTS, *CONVOLUTIONS):
                stack.extend(split(each)[0] for each in graph.data_inputs(graph.nodes[name]))
    return seen
