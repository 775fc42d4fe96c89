"""Moves every affine s * x + t of a graph into the weights of the linear ops around it.

    s * conv(x, W) + t  =  conv(x, s * W) + t          conv(s * x + t, W)  =  conv(x, s * W) + conv(t, W)

Batch norm, bias, scale and shift are all this one form, and all their moves are plans (`tfopt.rules.plan`): give the
operand of an affine node the coefficient that makes the node the identity (a move back), or take it from its result (a
move forward), and follow what that asks of the nodes around. What cannot move stays as it is, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, Shape, infer_shapes
from tfopt.model import Model
from tfopt.passes import Pass, for_each_body
from tfopt.rewrite import Log, Refused, apply
from tfopt.rules.absorb import HANDLERS, is_bias
from tfopt.rules.activations import protected
from tfopt.rules.affine import AFFINE_OPS, BATCH_NORMS, Unit, trains
from tfopt.rules.coefficients import canonical, divide
from tfopt.rules.commit import Shared, agrees, commit
from tfopt.rules.emit import BIAS_ADD_OPS, remove_identity, settle_bias
from tfopt.rules.layer_norm import RULES, is_fused_layer_norm
from tfopt.rules.linear import refine_shapes
from tfopt.rules.plan import SCALE, SHIFT, Plan, search
from tfopt.rules.view import View

# Every move takes an affine node away, so the sweeps end by themselves; this bounds them whatever happens.
MAX_SWEEPS = 8

# By how much a graph may grow where weights are shared by nodes that need different ones.
MAX_GROWTH_BYTES = 16384

BACK, FORWARD = "back", "forward"


def fold_affine(graph: Graph, library: Iterable[FunctionDef], log: Log) -> int:
    """Folds the affine nodes of one body in place.

    Args:
      graph: the body; constants should have been folded and identities removed, so that chains are seen as such.
      library: the functions that its nodes refer to.
      log: takes what was moved, what was left and why, and batch norms that serve in training mode.

    Returns:
      How many rewrites were made.
    """
    library = list(library)
    View(graph, {}).fold_expressions()
    edits = apply(RULES, graph, log)
    for key in [key for key in log.refused if key[0] in {rule.name for rule in RULES}]:
        del log.refused[key]  # a product that is no layer norm is nothing to report
    view = View(graph, infer_shapes(graph, library), protected(graph), library)
    refine_shapes(view)
    folder = _Folder(view, log)
    # Weights stay shared while that is possible; only then are small ones copied.
    edits += folder.sweep(0)
    if folder.waits:
        edits += folder.sweep(MAX_GROWTH_BYTES)
    edits += _settle(view, log)
    for node in graph.nodes.values():
        if trains(node) and not is_fused_layer_norm(graph, node):
            log.notes.append(f"probable bug: batch norm {node.name!r} serves in training mode")
    for name, _ in leftovers(graph, view.shapes):
        if {graph.nodes[user].op for user in graph.users(name)} <= {"Rsqrt", "Sqrt"} and graph.users(name):
            log.refused["fold_affine", name] = "an epsilon under a square root, through which a shift does not pass"
        else:
            log.refused["fold_affine", name] = folder.reasons.get(name, "it cannot move")
    return edits


def leftovers(graph: Graph, shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """The affine nodes of a body other than the one bias of a linear op.

    Args:
      graph: the body.
      shapes: its static shapes, from `infer_shapes`.

    Returns:
      (node name, "batch norm" | "scale" | "shift" | "scale and shift"), in the order of the graph. The constants of a
      GELU or hard swish are part of the activation, and are not counted.
    """
    view = View(graph, shapes, protected(graph))
    refine_shapes(view)
    found = []
    for node in graph.nodes.values():
        unit = view.unit(node)
        if unit is None or not (unit.scales or unit.shifts) or is_bias(view, unit):
            continue
        if node.name not in view.protected:
            found.append((node.name, _what(node, unit)))
    return found


def _what(node: NodeDef, unit: Unit) -> str:
    if node.op in BATCH_NORMS:
        return "batch norm"
    return " and ".join(["scale"] * unit.scales + ["shift"] * unit.shifts)


class _Folder:
    """Sweeps over the affine nodes of a body until none moves any more.

    Attributes:
      reasons: node -> why it did not move in the last sweep.
    """

    def __init__(self, view: View, log: Log):
        self.view = view
        self.log = log
        self.reasons: dict[str, str] = {}
        self._allowance = 0
        self._waiting: dict[tuple[str, str, str], list[str]] = {}

    @property
    def waits(self) -> bool:
        """Whether a move of the last sweep was refused because others use the weights."""
        return bool(self._waiting)

    def sweep(self, allowance: int) -> int:
        """Moves what can be moved; returns how many moves were made.

        Args:
          allowance: by how many bytes the constants may grow in all.
        """
        self._allowance = allowance
        graph = self.view.graph
        total = 0
        for _ in range(MAX_SWEEPS):
            self.reasons.clear()
            self._waiting.clear()
            moved = 0
            names = [node.name for node in graph.topological() if node.op in AFFINE_OPS]
            for kind in (SCALE, SHIFT):  # a scale that goes first leaves a shift that needs not pass it
                moved += sum(self._fold(name, kind) for name in names if name in graph.nodes)
            total += moved
            graph.sweep()
            self.view.forget()
            if not moved:
                break
        return total

    def _unit(self, name: str, kind: str) -> Unit | None:
        """The unit of a node that should move; None where there is nothing to move."""
        node = self.view.graph.nodes.get(name)
        unit = None if node is None or name in self.view.protected else self.view.unit(node)
        if unit is None or (kind == SCALE and not unit.scales):
            return None
        return None if kind == SHIFT and (not unit.shifts or is_bias(self.view, unit)) else unit

    def _fold(self, name: str, kind: str) -> int:
        node = self.view.graph.nodes[name]
        unit = None if name in self.view.protected else self.view.unit(node)
        if unit is not None and not (unit.scales or unit.shifts):
            try:
                remove_identity(self.view, unit)
            except Refused as refusal:
                self.reasons[name] = str(refusal)
                return 0
            self.log.applied["identity"] += 1
            return 1
        unit = self._unit(name, kind)
        if unit is None:
            return 0
        what = "batch norm" if node.op in BATCH_NORMS else kind
        refusals = []
        for way in (BACK, FORWARD):
            try:
                plan = self._plan(unit, kind, way)
                ends = _ends(plan)
                count = self._commit(plan, way)
            except Refused as refusal:
                refusals.append(f"{way}: {refusal}")
                continue
            self.log.applied[f"{what} -> {ends}" + (" (forward)" if way == FORWARD else "")] += count
            return count
        self.reasons[name] = "; ".join(refusals)
        return 0

    def _plan(self, unit: Unit, kind: str, way: str) -> Plan:
        return search(self.view, kind, unit.node, HANDLERS, lambda plan: _start(plan, unit, way))

    def _commit(self, plan: Plan, way: str) -> int:
        """Carries out a plan, together with those that waited for the other users of its weights; returns how many."""
        try:
            self._allowance -= commit([plan], allowance=self._allowance)
            return 1
        except Shared as refusal:
            keys = [(plan.kind, way, source) for source in refusal.sources]
            partners = dict.fromkeys(name for key in keys for name in self._waiting.get(key, ()) if name != plan.goal)
            for key in keys:
                self._waiting.setdefault(key, []).append(plan.goal)
            plans = [plan]
            for name in partners:
                unit = self._unit(name, plan.kind)
                partner = None if unit is None else self._plan(unit, plan.kind, way)
                if partner is not None and all(agrees(known, partner) for known in plans):
                    plans.append(partner)
            if len(plans) == 1:
                raise
            self._allowance -= commit(plans, allowance=self._allowance)
            return len(plans)


def _start(plan: Plan, unit: Unit, way: str) -> None:
    """The first coefficient: on the operand, so that the node need not do it, or on the result, so that others do."""
    if way == BACK:
        k = unit.scale if plan.kind == SCALE else canonical(divide(unit.shift, unit.scale))
        plan.decide(unit.x, k)
    else:
        k = divide(np.ones(()), unit.scale) if plan.kind == SCALE else canonical(-unit.shift)
        plan.decide(unit.node, k)


def _ends(plan: Plan) -> str:
    """The ops whose constants a plan changes, for the log."""
    graph = plan.graph
    names = [*plan.linears, *plan.biases, *(name for name, _ in plan.constants)]
    ops = sorted({graph.nodes[name].op for name in names})
    if not ops:
        ops = sorted({graph.nodes[name].op for name in plan.units if name != plan.goal})
    return " + ".join(ops) or "cancels"


def _settle(view: View, log: Log) -> int:
    """Puts each bias right after its linear op, as the BiasAdd that runtimes fuse with it."""
    settled = 0
    graph = view.graph
    for node in graph.topological():
        unit = view.unit(node) if node.name in graph.nodes else None
        if unit is None or node.name in view.protected or not is_bias(view, unit):
            continue
        producer = graph.producer(unit.x)
        if producer.op in ("Reshape", "Squeeze", "ExpandDims"):
            try:
                plan = search(view, SHIFT, node.name, HANDLERS, lambda plan, unit=unit: _start(plan, unit, BACK))  # type: ignore[misc]
                commit([plan], same_count=True)
            except Refused:
                continue
            log.applied["bias -> BiasAdd"] += 1
            settled += 1
        elif producer.op in BIAS_ADD_OPS and node.op != "BiasAdd" and settle_bias(view, unit):
            log.applied["bias -> BiasAdd"] += 1
            settled += 1
    if settled:
        graph.sweep()
        view.forget()
    return settled


def run(model: Model, log: Log) -> None:
    """Folds in the main body and in every function, in place."""
    library = model.library()
    for_each_body(model, lambda graph: fold_affine(graph, library, log))


PASS = Pass("fold_affine", run, needs=("prune_graph", "fold_constants"), keeps=("sparsity",))
