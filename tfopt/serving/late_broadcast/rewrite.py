"""What is the same for all rows of a request is computed once: it is repeated as late as the mathematics allows.

    f(tile(u, N), c)   becomes   g(h(u), c)    with f(tile(u, N), .) = g(tile(h(u), N), .)

Tensors that depend on inputs sent once, and on constants, have one row where the original has N equal ones (ONCE, see
`late_broadcast_ops`). They go through the ops that work row by row. Where they meet tensors of N rows, an op that
broadcasts by itself takes them as they are; a product after a concatenation is split (`late_broadcast_split`); before
everything else they are repeated N times, which is always right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Shape, infer_tensors, join, split
from tfopt.model import Model
from tfopt.passes.fold_shapes import Entries
from tfopt.rewrite import Log, Refused
from tfopt.serving.late_broadcast.ops import BATCH, EXACT, ONCE, View, form
from tfopt.serving.late_broadcast.rows import Rows
from tfopt.serving.late_broadcast.shapes import (
    SHAPED,
    drop_label,
    fixed,
    note_entries,
    one_row,
    with_lookups_of_known_shape,
)

_LONGEST = 16  # no shape has more dimensions that anybody computes with
_RULE = "broadcast later"


class LateBroadcast:
    """One run over the graph of a model.

    Attributes:
      graph: the graph, edited in place.
      kinds: reference -> ONCE or BATCH; EXACT where it is not here.
      tiled: reference of a ONCE tensor -> the same repeated.
      worked_once: names of nodes that now compute one row.
      of_one: reference -> static shape where the signature is given one row.
      symbols: reference of a small integer tensor -> its entries in terms of the number of rows.
    """

    def __init__(self, model: Model, once: Sequence[str], rows: Sequence[str], others: set[str], log: Log):
        """Prepares a run.

        Args:
          model: edited in place.
          once: Placeholders that get one row.
          rows: Placeholders of N rows; the first one, which every signature in question must have, says what N is.
          others: nodes that results without inputs sent once need: they know no N, so nothing is repeated for them.
          log: gets where rows had to be repeated, and why.

        Raises:
          Refused: TensorFlow cannot infer the shapes of the model for one row.
        """
        self.graph = model.graph
        self.log = log
        self.others = others
        self.kinds = {**dict.fromkeys(once, ONCE), **dict.fromkeys(rows, BATCH)}
        self.tiled: dict[str, str] = {}
        self._open: set[str] = set()  # ONCE tensors of which another dimension may depend on the number of rows
        self._varying = self.graph.dependents(list(self.kinds))
        self.worked_once: set[str] = set()
        self.symbols: dict[str, Entries] = {}
        trial = with_lookups_of_known_shape(self.graph)
        found = infer_tensors(trial, model.library())
        self.dtypes = {ref: dtype for ref, (dtype, _) in found.items()}
        self.shapes = {ref: shape for ref, (_, shape) in found.items()}
        self.rows = Rows(self.graph, rows[0], self.dtypes[rows[0]])
        for name in self.kinds:
            one_row(trial.nodes[name])
        try:
            self.of_one = {r: shape for r, (_, shape) in infer_tensors(trial, model.library()).items()}
        except ValueError as error:
            raise Refused(f"one row does not fit: {str(error).splitlines()[0]}") from error
        for name in once:
            one_row(self.graph.nodes[name])

    def run(self) -> None:
        """Rewrites the graph, whose results stay as they were."""
        from tfopt.serving.late_broadcast.split import Split

        self.splits = Split(self)
        for node in self.graph.topological():
            if node.name in self.kinds or not self.graph.data_inputs(node):
                continue
            self._visit(node)
            note_entries(self, node)
        for label, ref in list(self.graph.outputs.items()):
            self.graph.outputs[label] = self.full(ref)
        self.graph.sweep()
        self.worked_once &= self.graph.nodes.keys()

    def repeated(self) -> list[str]:
        """The tensors that are repeated."""
        return [ref for ref, tiled in self.tiled.items() if tiled in self.graph.nodes]

    # -- what is known of tensors ------------------------------------------------------------------------------------

    def kind(self, ref: str) -> str:
        """ONCE, BATCH or EXACT."""
        return self.kinds.get(join(*split(ref)), EXACT)

    def shape(self, ref: str) -> Shape:
        """The static shape of a tensor as it is now."""
        ref = join(*split(ref))
        return (self.of_one if self.kind(ref) == ONCE else self.shapes).get(ref)

    def dtype(self, ref: str) -> tf.DType:
        """The type of a tensor of the original."""
        return self.dtypes[join(*split(ref))]

    def add(self, hint: str, op: str, inputs: Sequence[str], kind: str, shape: Shape, **attrs: object) -> str:
        """Adds a node with one result of a known kind and shape."""
        ref = self.graph.add_op(hint, op, inputs, **attrs)
        self.set_result(ref, kind, shape)
        return ref

    def set_result(self, ref: str, kind: str, shape: Shape) -> None:
        """Notes what a new node gives."""
        self.kinds[ref] = kind
        self.of_one[ref] = self.shapes[ref] = shape
        self._varying.add(ref)
        if kind == ONCE:
            self.worked_once.add(ref)

    def view(self, node: NodeDef) -> View:
        """A node as the rules see it."""
        refs = self.graph.data_inputs(node)
        kinds = [self.kind(ref) for ref in refs]
        return View(node, kinds, [self.shape(ref) for ref in refs], lambda index: self.graph.constant(refs[index]))

    def entries(self, ref: str) -> Entries | None:
        """What is known of a small integer tensor of the original, in terms of the number of rows."""
        value = self.graph.constant(ref)
        if value is not None:
            return [int(v) for v in value.reshape(-1)] if value.size <= _LONGEST and value.dtype.kind in "iu" else None
        return self.symbols.get(join(*split(ref)))

    # -- repeating ---------------------------------------------------------------------------------------------------

    def full(self, ref: str, node: NodeDef | None = None, reason: str = "") -> str:
        """The tensor as the original has it: repeated where it is one row.

        Args:
          ref: the tensor.
          node: what wants it so, for the log.
          reason: why.
        """
        ref = join(*split(ref))
        if self.splits.holds(ref):
            self.splits.give_up(ref)
            return ref
        if self.kind(ref) != ONCE:
            return ref
        if node is not None:
            self.log.refused[_RULE, node.name] = f"{reason or f'{node.op} as it is used here does not work row by row'}"
        if ref not in self.tiled:
            shape = self.of_one[ref]
            assert shape is not None
            name = f"{split(ref)[0]}/every_row"
            dtype = self.dtype(ref) if ref in self.dtypes else None
            types = {} if dtype is None else {"T": dtype}
            if shape[0] == 1 and None not in shape:
                rest = [self.graph.add_constant(f"{name}/shape", np.array(shape[1:], np.int32))] if shape[1:] else []
                target = self.rows.concat(name, [self.rows.rows(), *rest])
                tiled = self.graph.add_op(name, "BroadcastTo", [ref, target], Tidx=tf.int32, **types)
            else:
                times = self.rows.multiples(len(shape))
                tiled = self.graph.add_op(name, "Tile", [ref, times], Tmultiples=tf.int32, **types)
            self.tiled[ref] = tiled
            self.kinds[tiled] = BATCH if shape[0] == 1 else EXACT
            self.shapes[tiled] = self.of_one[tiled] = (None, *shape[1:])
            self._varying.add(tiled)
        return self.tiled[ref]

    # -- the nodes ---------------------------------------------------------------------------------------------------

    def _visit(self, node: NodeDef) -> None:
        if self.splits.visit(node):
            return
        special = SHAPED.get(node.op)
        if special is not None:
            self._fill_inputs(node, self.graph.data_inputs(node)[1:], "its shape depends on values")
            kind = special(self, node)
            if kind is None:
                self._fill_inputs(node, self.graph.data_inputs(node), "its shape is not known in terms of the rows")
            elif kind != EXACT:
                self._give(node, kind)
            return
        while True:
            refs = self.graph.data_inputs(node)
            if all(self.kind(ref) == EXACT and not self.splits.holds(ref) for ref in refs):
                return
            mixed = [ref for ref in refs if self.splits.holds(ref)]
            if mixed:
                self._fill_inputs(node, mixed, "")
                continue
            view = self.view(node)
            found = form(view)
            outside = [ref for i, ref in enumerate(refs) if found is None or i not in found.carries]
            if any(self.kind(ref) == ONCE for ref in outside):
                self._fill_inputs(node, outside, "")
                continue
            if found is None:
                return
            carried = [refs[index] for index in found.carries]
            kinds = {self.kind(ref) for ref in carried}
            sizes = {self._size(ref) for ref in carried}
            if kinds == {ONCE} and len(sizes) == 1 and None not in sizes and self.of_one.get(node.name) is not None:
                self._give(node, ONCE)
            elif kinds == {BATCH}:
                self._give(node, BATCH)
            elif ONCE not in kinds:
                return
            elif (
                found.native and EXACT not in kinds and all(self._size(r) == 1 for r in carried if self.kind(r) == ONCE)
            ):
                if node.op == "Einsum":
                    drop_label(self, node, found.carries)
                self._give(node, BATCH)
            elif self.splits.join(node, carried):
                pass
            else:
                self._fill_inputs(node, carried, f"{node.op} takes rows beside rows")
                continue
            return

    def _size(self, ref: str) -> int | None:
        """How many rows a ONCE tensor has, 1 unless rows and another axis were joined; None where it is not known."""
        shape = self.shape(ref)
        return None if self.kind(ref) != ONCE or not shape else shape[0]

    def _give(self, node: NodeDef, kind: str) -> None:
        """Notes that the results of a node are of this kind."""
        first_alone = node.op.startswith("FusedBatchNorm")  # the others are moments
        ports = 0
        while join(node.name, ports) in self.shapes and not (first_alone and ports):
            self.kinds[join(node.name, ports)] = kind
            ports += 1
        if kind == ONCE:
            self.worked_once.add(node.name)
            if any(self._depends_on_rows(ref) for ref in self.graph.data_inputs(node)):
                for ref in (join(node.name, port) for port in range(ports)):
                    rows, others = (self.of_one.get(ref) or (None,))[0], self.shapes.get(ref)
                    if others is None:
                        raise Refused(f"the rank of {node.name!r} ({node.op}) is not known")
                    self.of_one[ref] = (rows, *others[1:])
                    self._open.add(ref)

    def _depends_on_rows(self, ref: str) -> bool:
        """Whether a dimension of a result may depend on the number of rows through this input."""
        ref = join(*split(ref))
        if self.kind(ref) == ONCE:
            return ref in self._open
        entries = self.entries(ref)
        known = entries is not None and None not in [fixed(entry) for entry in entries]
        return split(ref)[0] in self._varying and not known

    def _fill_inputs(self, node: NodeDef, refs: Sequence[str], reason: str) -> None:
        """Gives a node these inputs as the original has them."""
        wanted = {join(*split(ref)) for ref in refs}
        for index, ref in enumerate(list(node.input)):
            if not ref.startswith("^") and join(*split(ref)) in wanted:
                filled = self.full(ref, node, reason)
                if filled != join(*split(ref)):
                    self.graph.set_input(node.name, index, filled)

    def type_of(self, ref: str) -> tf.DType:
        """The type of a tensor, of the original or new."""
        found = self.dtypes.get(join(*split(ref)))
        return found if found is not None else tf.as_dtype(self.graph.producer(ref).attr["T"].type)
