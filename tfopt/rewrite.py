"""Patterns, rules, and the engine that applies them: every safety check lives here, none in a rule.

A rule is data: a pattern and a function from its match to what takes the place of the matched root. The engine refuses
a match, with a reason, whose interior nodes are visible from outside (another consumer, a result of the graph, a
control edge, another output port in use), and keeps control dependencies when a node goes away. A rule declines by
raising `Refused`; that is the only way.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, join, op_def, split

# Rewriting stops after this many sweeps over a body, whatever is left: a rule set that still changes the graph loops.
MAX_SWEEPS = 50

# Stateful in TensorFlow's registry, yet free to reorder or drop: they change nothing that others can see.
PURE_STATEFUL = frozenset(
    (
        *("Placeholder", "VarHandleOp", "VarIsInitializedOp", "StatelessIf", "StatelessWhile", "StatelessCase"),
        *("HashTableV2", "MutableHashTableV2", "LookupTableFindV2", "LookupTableSizeV2"),
        *("RandomUniform", "RandomStandardNormal", "TruncatedNormal", "RandomUniformInt", "Multinomial"),
        *("Assert", "Print", "PrintV2", "ImageSummary", "ScalarSummary", "HistogramSummary", "AudioSummaryV2"),
        *("TensorSummaryV2", "MergeSummary"),
    )
)


class Refused(Exception):  # noqa: N818 (a decision, not an error)
    """A rewrite declines a match; the message is the reason that reaches the report."""


@dataclasses.dataclass
class Log:
    """What a pass did: rule -> times applied, (rule, node) -> why not, and for the report: remarks, those of them that
    the owner should see first, and what each layer brings (`Step.sensitivity`).
    """

    applied: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    sensitivity: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Op:
    """Matches a node by its op and its data inputs.

    Attributes:
      op: the op, or the ops, that match.
      inputs: one pattern per data input: an `Op` (an interior node), a str (binds whatever reference is there), or
        `Const(name)`. Empty matches any inputs.
      name: binds the node under this name in the match.
      commutes: whether the two inputs may also match the other way round.
    """

    op: str | tuple[str, ...]
    inputs: tuple[Op | Const | str, ...] = ()
    name: str = "root"
    commutes: bool = False


@dataclasses.dataclass(frozen=True)
class Const:
    """Matches a reference to a constant or a weight and binds its reference."""

    name: str


@dataclasses.dataclass
class Match:
    """A match: bound nodes and references, and the graph to add new nodes to."""

    graph: Graph
    root: NodeDef
    nodes: dict[str, NodeDef] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def value(self, name: str) -> np.ndarray:
        """The value of a reference that a `Const` bound."""
        value = self.graph.constant(self.refs[name])
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rewrite as data.

    Attributes:
      name: how the report calls it.
      pattern: what it matches; its root is the node to be replaced.
      rewrite: from the match to the replacement of the root: a reference that takes over for the root's first output,
        or a NodeDef that takes the root's place under the root's name. It may add nodes, and edits nothing else.
    """

    name: str
    pattern: Op
    rewrite: Callable[[Match], Any]


def has_effect(node: NodeDef) -> bool:
    """Whether running the node is visible otherwise than by its outputs (assignments, queues, I/O, ordered reads)."""
    if node.op in PURE_STATEFUL:
        return False
    definition = op_def(node.op)
    if definition is None:  # a direct call of a function
        return True
    if node.op in ("ReadVariableOp", "ResourceGather", "ResourceGatherNd"):
        return True  # the order of a read against an assignment matters; reads of weights are gone after loading
    return definition.is_stateful


def check_exclusive(graph: Graph, name: str, inside: Iterable[str]) -> None:
    """Raises Refused unless node `name` is visible only to the nodes `inside`, through its first output.

    This is the legality of changing what an interior node computes: nobody else must see it.
    """
    inside = set(inside)
    node = graph.nodes[name]
    if graph.output_labels(name):
        raise Refused(f"{node.op} {name!r} is a result of the graph")
    if name in graph.keep:
        raise Refused(f"{node.op} {name!r} must be kept")
    if any(ref.startswith("^") for ref in node.input):
        raise Refused(f"{node.op} {name!r} has control edges")
    for user, _, port in graph.uses(name):
        if port == -1:
            raise Refused(f"{node.op} {name!r} has control edges")
        if user not in inside:
            raise Refused(f"{node.op} {name!r} also feeds {graph.nodes[user].op} {user!r}")
        if port != 0:
            raise Refused(f"output {port} of {node.op} {name!r} is in use")


def find(graph: Graph, rule: Rule, root: NodeDef) -> Match | None:
    """Matches the pattern of a rule at a node; None where it does not fit. Legality is not checked here."""
    match = Match(graph, root)
    return match if _match_node(graph, rule.pattern, root, match) else None


def _match_node(graph: Graph, pattern: Op, node: NodeDef, match: Match) -> bool:
    ops = (pattern.op,) if isinstance(pattern.op, str) else pattern.op
    if node.op not in ops:
        return False
    inputs = graph.data_inputs(node)
    if pattern.inputs:
        if len(inputs) != len(pattern.inputs):
            return False
        orders = [inputs, inputs[::-1]] if pattern.commutes else [inputs]
        for order in orders:
            trial = Match(graph, match.root, dict(match.nodes), dict(match.refs))
            if all(_match_ref(graph, p, r, trial) for p, r in zip(pattern.inputs, order, strict=True)):
                match.nodes, match.refs = trial.nodes, trial.refs
                break
        else:
            return False
    match.nodes[pattern.name] = node
    return True


def _match_ref(graph: Graph, pattern: Op | Const | str, ref: str, match: Match) -> bool:
    if isinstance(pattern, str):
        return match.refs.setdefault(pattern, ref) == ref
    if isinstance(pattern, Const):
        if graph.constant(ref) is None:
            return False
        return match.refs.setdefault(pattern.name, ref) == ref
    name, port = split(ref)
    return port == 0 and _match_node(graph, pattern, graph.nodes[name], match)


def apply(rules: Sequence[Rule], graph: Graph, log: Log) -> int:
    """Applies rules to one body until none fits any more (at most MAX_SWEEPS sweeps).

    Returns:
      How many matches were rewritten. What was refused, and why, is in the log.
    """
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in (rule.pattern.op,) if isinstance(rule.pattern.op, str) else rule.pattern.op:
            by_op.setdefault(op, []).append(rule)
    total = 0
    for _ in range(MAX_SWEEPS):
        changed = 0
        refused: dict[tuple[str, str], str] = {}
        for node in graph.topological():
            for rule in by_op.get(node.op, ()):
                alive = graph.nodes.get(node.name) is node
                if not alive:
                    break
                match = find(graph, rule, node)
                if match is None:
                    continue
                try:
                    _commit(graph, match, rule)
                except Refused as refusal:
                    refused[rule.name, node.name] = str(refusal)
                    continue
                changed += 1
                log.applied[rule.name] += 1
        graph.sweep()
        total += changed
        if not changed:
            break
    log.refused.update(refused)
    return total


def _commit(graph: Graph, match: Match, rule: Rule) -> None:
    """Checks that a match is legal, rewrites it, and puts the replacement where the root was."""
    root = match.root
    inside = {node.name for node in match.nodes.values()}
    for node in match.nodes.values():
        if node is not root:
            check_exclusive(graph, node.name, inside)
    if any(port > 0 for _, _, port in graph.uses(root.name)) or any(
        split(ref)[0] == root.name and split(ref)[1] > 0 for ref in graph.outputs.values()
    ):
        raise Refused(f"another output of {root.op} {root.name!r} is in use")
    replacement: Any = rule.rewrite(match)
    if isinstance(replacement, str):
        remove_node(graph, root.name, replacement)
        return
    if replacement.name != root.name:
        raise ValueError(f"rule {rule.name!r} renamed {root.name!r} to {replacement.name!r}")
    replacement.input.extend(f"^{name}" for name in graph.control_inputs(root))
    graph.replace(replacement)


def remove_node(graph: Graph, name: str, replacement: str) -> None:
    """Takes a node out: its consumers read `replacement`, and what it waited for is waited for by those after it.

    Raises:
      Refused: control edges make that impossible (a v1 loop or branch would lose what holds it together).
    """
    node = graph.nodes[name]
    producer, port = split(replacement)
    before = graph.control_inputs(node)
    waits = any(p == -1 for _, _, p in graph.uses(name))
    if name in graph.keep:
        raise Refused(f"{node.op} {name!r} must be kept")
    if graph.nodes[producer].op in ("Switch", "RefSwitch") and (waits or before):
        raise Refused(f"{node.op} {name!r} holds the control edges of a v1 branch")
    if before and graph.output_labels(name):
        raise Refused(f"{node.op} {name!r} is a result that waits for {before[0]!r}")
    if before:
        # The control edges move to the consumers, so that whatever reads the value still runs after them.
        for user in dict.fromkeys(user for user, _, p in graph.uses(name) if p >= 0):
            if graph.nodes[user].op in ("Merge", "RefMerge"):
                raise Refused(f"{node.op} {name!r} holds the control edges of a v1 branch")
            refs = list(graph.nodes[user].input)
            graph.set_inputs(user, refs + [f"^{b}" for b in before if f"^{b}" not in refs])
    graph.redirect_control(name, [producer, *before])
    graph.redirect(join(name), join(producer, port))
