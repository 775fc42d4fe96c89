"""A product after a concatenation is computed in two parts, of which one needs one row only.

    [u, c] W = u W_u + c W_c        W_u, W_c: the rows of W that u and c meet; exact but for rounding

With the bias added to the one row as well, the product of the N rows is left with one addition, as before. What works
on each number alone, or has a constant for each column, goes through it: relu([u, c]) = [relu(u), relu(c)].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import join, make_node, split
from tfopt.rules.constants import attr
from tfopt.serving.late_broadcast.ops import BATCH, BINARY, ELEMENTWISE, ONCE

if TYPE_CHECKING:
    from tfopt.serving.late_broadcast.rewrite import LateBroadcast

_CONCATS = ("ConcatV2", "Concat")
_ADDITIONS = ("BiasAdd", "AddV2", "Add")


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns of a matrix: a tensor (rows, width), ONCE or BATCH."""

    ref: str
    kind: str
    width: int


@dataclasses.dataclass(frozen=True)
class _Product:
    """A split product: the nodes of u W_u, which may have a bias already, and of c W_c."""

    once: str
    rows: str
    width: int


class Split:
    """Concatenations of rows sent once with others, as long as nobody needs them whole."""

    def __init__(self, owner: LateBroadcast):
        self.owner = owner
        self.graph = owner.graph
        self._parts: dict[str, list[Part]] = {}
        self._whole: set[str] = set()  # those of them that somebody needs whole as well
        self._products: dict[str, _Product] = {}

    def holds(self, ref: str) -> bool:
        """Whether a tensor is there in parts alone."""
        ref = join(*split(ref))
        return ref in self._parts and ref not in self._whole

    def give_up(self, ref: str) -> None:
        """Has a tensor that is held in parts computed whole: rows sent once are repeated before it."""
        self._whole.add(ref)
        node = self.graph.producer(ref)
        for index, given in enumerate(list(node.input)):
            if not given.startswith("^"):
                whole = self.owner.full(given, node, f"{node.op} is needed whole")
                if whole != join(*split(given)):
                    self.graph.set_input(node.name, index, whole)
        self.owner.kinds[ref] = BATCH

    def join(self, node: NodeDef, carried: Sequence[str]) -> bool:
        """Holds the result of a concatenation in parts, where it is one of matrices along the last axis."""
        if node.op not in _CONCATS or any(ref.startswith("^") for ref in node.input):
            return False
        parts: list[Part] = []
        for given in carried:
            ref = join(*split(given))
            shape, kind = self.owner.shape(ref), self.owner.kind(ref)
            if ref in self._parts:
                parts += self._parts[ref]
            elif shape is None or len(shape) != 2 or shape[1] is None or shape[0] != (1 if kind == ONCE else None):
                return False
            else:  # what stands beside N rows has N
                parts.append(Part(ref, ONCE if kind == ONCE else BATCH, shape[1]))
        if {part.kind for part in parts} != {ONCE, BATCH}:
            return False
        self._parts[node.name] = parts
        return True

    def visit(self, node: NodeDef) -> bool:
        """Takes a node through, where it reads what is held in parts; returns whether it did."""
        refs = [join(*split(ref)) for ref in self.graph.data_inputs(node)]
        if self._add_bias(node, refs):
            return True
        held = [index for index, ref in enumerate(refs) if ref in self._parts]
        if not held or any(ref.startswith("^") for ref in node.input):
            return False
        if node.op in _CONCATS:
            values = refs[:-1] if node.op == "ConcatV2" else refs[1:]
            axis = self.graph.constant(refs[-1] if node.op == "ConcatV2" else refs[0])
            return axis is not None and int(axis.reshape(-1)[0]) in (1, -1) and self.join(node, values)
        if len(held) > 1:
            return False
        parts = self._parts[refs[held[0]]]
        if node.op == "MatMul" and held == [0]:
            return self._product(node, parts, refs[1])
        if node.op in ELEMENTWISE and len(refs) == 1:
            self._each(node, parts, 0, None)
            return True
        if (node.op in BINARY or node.op == "BiasAdd") and len(refs) == 2:
            return self._columns(node, parts, held[0], self.graph.constant(refs[1 - held[0]]))
        return False

    def _columns(self, node: NodeDef, parts: list[Part], held: int, value: np.ndarray | None) -> bool:
        """An op with a constant for each column."""
        width = sum(part.width for part in parts)
        if value is None or value.ndim > 2 or (value.ndim == 2 and value.shape[0] != 1):
            return False
        if value.ndim and value.shape[-1] not in (1, width):
            return False
        self._each(node, parts, held, value)
        return True

    def _each(self, node: NodeDef, parts: list[Part], held: int, value: np.ndarray | None) -> None:
        """Copies a node for each part."""
        copies, start = [], 0
        for number, part in enumerate(parts):
            copy = NodeDef()
            copy.CopyFrom(node)
            copy.name = self.graph.unique_name(f"{node.name}/part_{number}")
            copy.input[held] = part.ref
            if value is not None and value.ndim and value.shape[-1] > 1:
                columns = np.ascontiguousarray(value[..., start : start + part.width])
                copy.input[1 - held] = self.graph.add_constant(f"{copy.name}/columns", columns)
            ref = self.graph.add(copy)
            self.owner.set_result(ref, part.kind, (1 if part.kind == ONCE else None, part.width))
            copies.append(Part(ref, part.kind, part.width))
            start += part.width
        self._parts[node.name] = copies

    def _product(self, node: NodeDef, parts: list[Part], weight: str) -> bool:
        kernel = self.graph.constant(weight)
        transposed = attr(node, "transpose_b").b
        if kernel is None or kernel.ndim != 2 or attr(node, "transpose_a").b:
            return False
        rows = kernel.T if transposed else kernel
        if len(rows) != sum(part.width for part in parts):
            return False
        dtype = tf.as_dtype(node.attr["T"].type)
        bounds = np.cumsum([0, *(part.width for part in parts)])
        products = {}
        for kind, name in ((ONCE, "once"), (BATCH, "rows")):
            chosen = [number for number, part in enumerate(parts) if part.kind == kind]
            own = np.concatenate([rows[bounds[number] : bounds[number + 1]] for number in chosen])
            hint = f"{node.name}/{name}"
            x = self._concat(hint, [parts[number] for number in chosen], kind, dtype)
            factor = self.graph.add_constant(f"{hint}/kernel", np.ascontiguousarray(own.T if transposed else own))
            products[kind] = self.owner.add(
                hint,
                "MatMul",
                [x, factor],
                kind,
                (1 if kind == ONCE else None, rows.shape[1]),
                T=dtype,
                transpose_a=False,
                transpose_b=bool(transposed),
            )
        self._sum(node, _Product(products[ONCE], products[BATCH], rows.shape[1]), dtype)
        self.owner.log.applied["product split into one row and the others"] += 1
        return True

    def _concat(self, hint: str, parts: list[Part], kind: str, dtype: tf.DType) -> str:
        if len(parts) == 1:
            return parts[0].ref
        axis = self.graph.add_constant(f"{hint}/axis", np.array(1, np.int32))
        shape = (1 if kind == ONCE else None, sum(part.width for part in parts))
        refs = [*(part.ref for part in parts), axis]
        return self.owner.add(f"{hint}/columns", "ConcatV2", refs, kind, shape, T=dtype, Tidx=tf.int32, N=len(parts))

    def _sum(self, node: NodeDef, product: _Product, dtype: tf.DType) -> None:
        """Puts c W_c + u W_u in the place of a node; the row is a bias to the product, which runtimes fuse."""
        if dtype.is_floating:
            size = self.graph.add_constant(f"{node.name}/size", np.array([product.width], np.int32))
            bias = self.graph.add_op(f"{node.name}/bias", "Reshape", [product.once, size], T=dtype, Tshape=tf.int32)
            new = make_node(node.name, "BiasAdd", [product.rows, bias], T=dtype, data_format="NHWC")
        else:
            new = make_node(node.name, "AddV2", [product.rows, product.once], T=dtype)
        self.graph.replace(new)
        self.owner.kinds[node.name] = BATCH
        self._products[node.name] = product

    def _add_bias(self, node: NodeDef, refs: list[str]) -> bool:
        """A bias after a split product is added to the one row."""
        if node.op not in _ADDITIONS or len(refs) != 2 or any(ref.startswith("^") for ref in node.input):
            return False
        position = next((index for index, ref in enumerate(refs) if ref in self._products), None)
        if position is None or (node.op == "BiasAdd" and position):
            return False
        product, source = self._products[refs[position]], refs[position]
        bias = self.graph.constant(refs[1 - position])
        if bias is None or bias.shape not in ((product.width,), (1, product.width)):
            return False
        if len(self.graph.users(source)) > 1 or self.graph.output_labels(source):
            return False
        dtype = tf.as_dtype(node.attr["T"].type)
        hint, shape = f"{node.name}/once", (1, product.width)
        once = self.owner.add(hint, "AddV2", [product.once, refs[1 - position]], ONCE, shape, T=dtype)
        self._sum(node, dataclasses.replace(product, once=once), dtype)
        return True
