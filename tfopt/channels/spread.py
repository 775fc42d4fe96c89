"""Which channels go together: ids are spread over a graph, op by op (compare Fang et al. 2023, "DepGraph").

A product sum_i W[i, o] x[i] joins the channels of x with the axis i of W, and gives its result those of the axis o. Ops
that work element by element join their operands; those that move elements move the ids. What an op would compute
otherwise with fewer channels (a softmax over them), what a caller sees, and what is not understood, is fixed.

The masks are exact: a graph whose channels were cut gives what the uncut one gives when the weights that read these
channels are zero; but for sums and means over the channels themselves (layer norm), which are lossy.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.ids import Axes, Ids, live
from tfopt.graph import Shape, called_functions, join, split
from tfopt.model import Model

Kept = Callable[[np.ndarray], np.ndarray]  # from an axis to the mask of what stays of it
Cut = Callable[[Kept], None]


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear op: what it costs, and the axes on which that depends.

    Attributes:
      node: its name.
      macs: multiply-accumulates at batch 1.
      axes: axes of channels; the cost is in proportion to each.
      makes: the axis of its result that its weights make; None where there is none.
      reads: (reference of x, axis, name of the constant W, axis) where it sums over one axis of both.
    """

    node: str
    macs: int
    axes: tuple[np.ndarray, ...]
    makes: np.ndarray | None
    reads: tuple[str, int, str, int] | None = None


class Spread:
    """Ids over the main body of a model.

    Attributes:
      graph: the body, which stays as it is.
      ids: the ids and joins.
      constants: name of a float constant or weight -> the ids of its axes.
      roles: (constant, axis) -> "makes" channels, "reads" them, or "scales" those that it is given ("gamma": as a batch
        norm does).
      products: the linear ops, in order.
      cuts: what has to be done to nodes, beside cutting constants, when channels go: each takes a function from an axis
        to the mask of what stays of it.
      unknown: op that is not followed, and so fixes channels -> why.
    """

    def __init__(self, model: Model):
        self.graph = model.graph
        self.ids = Ids()
        self.constants: dict[str, Axes] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.products: list[Product] = []
        self.cuts: list[Cut] = []
        self.unknown: dict[str, str] = {}
        self._types = tensors_at_batch_1(model)
        self._axes: dict[str, Axes | None] = {}
        self._still: set[str] = set()  # computed from constants alone
        for node in self.graph.topological():
            if self.graph.constant(node.name) is not None or self._of_constants(node):
                self._still.add(node.name)
            self._visit(node)
        for label, ref in self.graph.outputs.items():
            self.pin(self.axes(ref), f"they are the output {label.partition(':')[2]!r} of the model")

    # -- reading --------------------------------------------------------------------------------------------------

    def shape(self, ref: str) -> Shape:
        """The static shape of a reference at batch 1."""
        found = self._types.get(join(*split(ref)))
        return None if found is None else found[1]

    def varies(self, ref: str) -> bool:
        """Whether a tensor holds floats, or bools, that depend on the inputs of the model; shapes do not count."""
        found = self._types.get(join(*split(ref)))
        return split(ref)[0] not in self._still and (found is None or not found[0].is_integer)

    def axes(self, ref: str) -> Axes | None:
        """The ids of the axes of a reference; None where its rank is unknown."""
        return self._axes.get(join(*split(ref)))

    def tensors(self) -> Iterator[Axes]:
        """The ids of every tensor whose rank is known."""
        return (axes for axes in self._axes.values() if axes is not None)

    def inputs(self, node: NodeDef) -> list[str]:
        """Its data inputs."""
        return self.graph.data_inputs(node)

    def operand(self, node: NodeDef, index: int) -> Axes:
        """The ids of an operand.

        Raises:
          Unknown: its rank is not known.
        """
        axes = self.axes(self.inputs(node)[index])
        if axes is None:
            raise Unknown("the rank of an operand is not known")
        return axes

    def integers(self, node: NodeDef, index: int) -> np.ndarray:
        """An operand that has to be constant: axes, paddings, sizes.

        Raises:
          Unknown: it is not.
        """
        value = self.graph.constant(self.inputs(node)[index])
        if value is None:
            raise Unknown("one of its operands is not constant")
        return value

    def constant_name(self, ref: str) -> str | None:
        """The node that holds the value of a reference to a float constant, seen through Identity."""
        while (name := split(ref)[0]) not in self.constants:
            node = self.graph.nodes[name]
            if node.op != "Identity" or not node.input:
                return None
            ref = node.input[0]
        return name

    # -- writing --------------------------------------------------------------------------------------------------

    def pin(self, axes: Axes | None, reason: str) -> None:
        """Says that all axes must stay as they are."""
        for axis in axes or ():
            self.ids.pin(axis, reason)

    def result(self, node: NodeDef, axes: Axes, port: int = 0) -> None:
        """Sets the ids of an output."""
        shape = self.shape(join(node.name, port))
        if shape is None or len(shape) != len(axes):
            raise Unknown("the shape of its result is not known")
        fitting = []
        for size, axis in zip(shape, axes, strict=True):
            if size is not None and axis.shape != (size,):
                if axis.ndim:
                    raise Unknown("its result has another shape than expected")
                axis = np.full(size, axis)
            fitting.append(axis)
        self._axes[join(node.name, port)] = tuple(fitting)

    def role(self, ref: str, axis: int, role: str) -> None:
        """Notes what an axis of a constant is for the channels."""
        name = self.constant_name(ref)
        if name is not None:
            self.roles[name, axis % len(self.constants[name])] = role

    def product(
        self,
        node: NodeDef,
        sizes: list[int | None],
        axes: list[np.ndarray],
        makes: np.ndarray | None,
        reads: tuple[str, int, str, int] | None = None,
    ) -> None:
        """Notes a linear op; sizes that are not known count as 1."""
        if reads is not None:
            name = self.constant_name(reads[2])
            reads = None if name is None else (join(*split(reads[0])), reads[1], name, reads[3])
        macs = math.prod(size or 1 for size in sizes)
        self.products.append(Product(node.name, macs, tuple(axes), makes, reads))

    def fixed(self, node: NodeDef, reason: str) -> None:
        """Gives every output of a node axes that stay as they are."""
        port = 0
        while (ref := join(node.name, port)) in self._types:
            shape = self._types[ref][1]
            self._axes[ref] = None if shape is None else tuple(self.ids.fixed(size, reason) for size in shape)
            port += 1

    def _visit(self, node: NodeDef) -> None:
        handlers = _handlers()
        if node.op in ("Const", "Placeholder") and self._constant(node):
            return
        reason = f"{node.op} {node.name!r} is not followed"
        if called_functions(node):
            reason = f"channels are not followed into {node.op} {node.name!r}, a loop, branch or call"
        if node.op in ("Placeholder", "PlaceholderWithDefault", "VarHandleOp"):
            self.fixed(node, "they come from outside")
            return
        if node.op in ("Shape", "ShapeN", "Rank", "Size", "NoOp"):
            self.fixed(node, "they are a shape")  # computed at run time, and so true of what is left
            return
        try:
            if node.op in handlers:
                handlers[node.op](self, node)
                return
        except Unknown as unknown:
            reason = f"{node.op} {node.name!r}: {unknown}"
        for ref in self.inputs(node):
            axes = self.axes(ref) or ()
            if self.varies(ref) and any(live(axis) for axis in axes):
                self.unknown[node.name] = reason
            self.pin(axes, reason)
        self.fixed(node, reason)

    def _of_constants(self, node: NodeDef) -> bool:
        refs = self.inputs(node)
        return node.op == "Const" or (bool(refs) and all(split(ref)[0] in self._still for ref in refs))

    def _constant(self, node: NodeDef) -> bool:
        value = self.graph.constant(node.name)
        if value is None:
            return False
        if value.dtype.kind == "f" or value.dtype == tf.bfloat16.as_numpy_dtype:
            self.constants[node.name] = tuple(self.ids.new(size) for size in value.shape)
            self._axes[node.name] = self.constants[node.name]
        else:
            self._axes[node.name] = tuple(self.ids.fixed(n, "they index a constant of integers") for n in value.shape)
        return True


class Unknown(Exception):  # noqa: N818 (a decision, not an error)
    """An op cannot be followed; the message says why."""


def tensors_at_batch_1(model: Model) -> dict[str, tuple[Any, Shape]]:
    """Type and static shape of every output, with a first dimension of 1 where an input leaves it open."""
    graph_def = model.graph.to_graph_def(model.library())
    for node in graph_def.node:
        if node.op == "Placeholder" and node.name not in model.weights and node.attr["shape"].shape.dim:
            first = node.attr["shape"].shape.dim[0]
            first.size = 1 if first.size < 0 else first.size
    with tf.Graph().as_default() as imported:
        tf.graph_util.import_graph_def(graph_def, name="")
    return {
        join(operation.name, port): (t.dtype, None if t.shape.rank is None else tuple(t.shape.as_list()))
        for operation in imported.get_operations()
        for port, t in enumerate(operation.outputs)
    }


def _handlers() -> dict[str, Callable[[Spread, NodeDef], None]]:
    if not _HANDLERS:
        for name in ("linear", "elementwise", "moves", "slices", "reshapes"):
            _HANDLERS.update(importlib.import_module(f"tfopt.channels.{name}").HANDLERS)
    return _HANDLERS


_HANDLERS: dict[str, Callable[[Spread, NodeDef], None]] = {}
