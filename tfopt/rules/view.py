"""A graph as the affine rules see it: constants with their values, static shapes, affine nodes, bodies of loops."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, Shape, function_body, join, split
from tfopt.rewrite import Refused, has_effect
from tfopt.rules.affine import AFFINE_OPS, Unit, read
from tfopt.rules.constants import MAX_DEPTH, OPS

# Steps for unusually long travels, in all.
RESERVE = 20_000

# Larger expressions are left to constant folding, which weighs what the model would gain.
MAX_EXPRESSION_BYTES = 65536


class View:
    """A graph as the affine rules see it: its constants and shapes.

    Attributes:
      graph: the body.
      shapes: reference -> static shape, kept up to date by those who add nodes.
      protected: node -> why its constants must stay as they are.
      reserve: how many steps are left for affines that travel unusually far.
    """

    def __init__(
        self,
        graph: Graph,
        shapes: Mapping[str, Shape],
        protected: Mapping[str, str] | None = None,
        library: Iterable[FunctionDef] = (),
    ):
        self.graph = graph
        self.shapes = dict(shapes)
        self.protected = protected or {}
        self.reserve = RESERVE
        self._values: dict[str, np.ndarray | None] = {}
        self._units: dict[tuple[str, ...], Unit | None] = {}
        self._written: dict[tuple, str] = {}
        self._library = {function.signature.name: function for function in library}
        self._bodies: dict[str, Graph] = {}

    def body(self, name: str) -> Graph:
        """The body of a function of the library, for reading: without Identity nodes and control edges.

        Raises:
          Refused: it is not there, or cannot be read.
        """
        if name not in self._bodies:
            if name not in self._library:
                raise Refused(f"function {name!r} is not known")
            try:
                body = function_body(self._library[name], self._library)
            except (ValueError, KeyError):
                raise Refused(f"function {name!r} cannot be read") from None
            for node in body.nodes.values():
                body.set_inputs(node.name, body.data_inputs(node))
                if node.op == "Identity":
                    body.redirect(node.name, node.input[0])
            body.keep = [node.name for node in body.nodes.values() if has_effect(node)]
            body.sweep()
            self._bodies[name] = body
        return self._bodies[name]

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
            compute = OPS.get(node.op)
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
            self._units[key] = read(self, node)
        return self._units[key]

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
