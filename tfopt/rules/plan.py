"""A plan: what would have to change so that one tensor carries k * x (or x + k) in place of x.

    Every tensor T of a graph may be given a coefficient k: T' = k * T (a scale plan) or T' = T + k (a shift plan).
    The graph still computes the same if every node agrees with the coefficients of its operands and results:
        relu:  k_out = k_in >= 0        add:  k_out = k_a = k_b        conv: any k_in, k_out, by other weights

A plan starts from one coefficient, asks the nodes beside it what follows for theirs, and goes on until all agree or one
refuses. Nothing is edited before that, so backward and forward moves, branches that split and join, and a second
consumer that can make up for the change are one and the same case.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import join, split
from tfopt.rewrite import Refused
from tfopt.rules.coefficients import canonical, divide, same
from tfopt.rules.view import View

# An affine travels through this many nodes, and on while the reserve of its graph lasts (one for all its affines), to
# the maximum: so planning is linear in the size of the graph, and a small graph is searched in full.
USUAL_NODES = 64
MAX_NODES = 512

# Choices (which branch of a sum takes a shift) are tried in at most this many combinations.
MAX_TRIES = 8

SCALE, SHIFT = "scale", "shift"

Handler = Callable[["Plan", NodeDef], None]


class Plan:
    """The coefficients found so far, and the edits that follow from them.

    Attributes:
      view: the graph.
      kind: SCALE or SHIFT.
      goal: the affine node that shall vanish.
      factors: reference -> coefficient.
      constants: (node, input index) -> coefficient of a constant operand, of which a new one is to be written.
      linears: linear nodes whose weights change.
      units: affine nodes whose constants change.
      biases: linear node -> bias to be added after it.
      choices: what was chosen so far, out of how many.
      written: the new constants of a finished plan, once they have been computed.
    """

    def __init__(self, view: View, kind: str, goal: str, handlers: Mapping[str, Handler], script: Iterable[int] = ()):
        self.view = view
        self.graph = view.graph
        self.kind = kind
        self.goal = goal
        self.factors: dict[str, np.ndarray] = {}
        self.constants: dict[tuple[str, int], np.ndarray] = {}
        self.linears: dict[str, None] = {}
        self.units: dict[str, None] = {goal: None}
        self.biases: dict[str, np.ndarray] = {}
        self.choices: list[tuple[int, int]] = []
        self.written: dict[tuple[str, int], np.ndarray] | None = None
        self._handlers = handlers
        self._script = list(script)
        self._chosen: dict[str, int] = {}
        self._queue: collections.deque[tuple[str, str]] = collections.deque()
        self._late: collections.deque[tuple[str, str]] = collections.deque()
        self._visible = set(self.graph.outputs.values())
        self._solved = 0

    @property
    def identity(self) -> np.ndarray:
        """The coefficient that changes nothing."""
        return np.ones(()) if self.kind == SCALE else np.zeros(())

    # -- what handlers ask and say --------------------------------------------------------------------------------

    def result(self, node: NodeDef, port: int = 0) -> np.ndarray | None:
        """The coefficient of a result; None while it is open (it then counts as the identity)."""
        return self.factors.get(join(node.name, port))

    def operand(self, node: NodeDef, index: int) -> np.ndarray | None:
        """The coefficient of an operand; None while it is open."""
        ref = join(*split(node.input[index]))
        return self.constants.get((node.name, index)) if self.is_constant(ref) else self.factors.get(ref)

    def is_constant(self, ref: str) -> bool:
        """Whether a reference is a constant, which can take any coefficient by being written anew."""
        return self.view.value(ref) is not None

    def give_result(self, node: NodeDef, k: np.ndarray, port: int = 0) -> None:
        """Decides the coefficient of a result.

        Raises:
          Refused: it was decided otherwise, or the tensor is visible from outside.
        """
        self.decide(join(node.name, port), k)

    def give_operand(self, node: NodeDef, index: int, k: np.ndarray) -> None:
        """Decides the coefficient of an operand; see `give_result`."""
        ref = join(*split(node.input[index]))
        if not self.is_constant(ref):
            self.decide(ref, k)
            return
        value = self.view.value(ref)
        if self.kind == SCALE and value is not None and not value.any():
            return
        self._settle(self.constants, (node.name, index), k)

    def decide(self, ref: str, k: np.ndarray) -> None:
        """Decides the coefficient of a tensor and asks the nodes beside it."""
        if not self._settle(self.factors, ref, k):
            return
        name = split(ref)[0]
        producer = self.graph.nodes[name]
        k = self.factors[ref]
        if ref in self._visible:
            raise Refused(f"{producer.op} {name!r} is a result of the graph")
        if name in self.graph.arguments:
            raise Refused(f"{name!r} is an input of the graph")
        rank = self.view.rank(ref)
        if k.ndim and k.ndim != rank:
            raise Refused(f"the rank of {producer.op} {name!r} is not known")
        self._ask(name, "")
        for user, _, port in self.graph.uses(name):
            if port >= 0 and join(name, port) == ref and user != name:
                self._ask(user, name)

    def choose(self, node: NodeDef, options: int) -> int:
        """Picks one of several ways for a node; the search tries the others if this one ends in a refusal."""
        if node.name not in self._chosen:
            position = len(self.choices)
            choice = self._script[position] if position < len(self._script) else 0
            self.choices.append((choice, options))
            self._chosen[node.name] = choice
        return self._chosen[node.name]

    def _settle(self, where: dict, key: object, k: np.ndarray) -> bool:
        k = canonical(k)
        known = where.get(key)
        if known is not None:
            if not same(known, k):
                raise Refused("two ways that it would have to go disagree")
            return False
        if np.isnan(k).any():
            raise Refused("its values are not finite")
        if same(k, self.identity):
            return False
        where[key] = k
        return True

    # -- running ----------------------------------------------------------------------------------------------------

    def _ask(self, name: str, source: str) -> None:
        late = self.graph.nodes[name].op in LATE
        (self._late if late else self._queue).append((name, source))

    def run(self) -> None:
        """Asks nodes until all agree.

        Raises:
          Refused: one does not.
        """
        while self._queue or self._late:
            name, source = self._queue.popleft() if self._queue else self._late.popleft()
            self._solved += 1
            if self._solved > USUAL_NODES:
                self.view.reserve -= 1
                if self.view.reserve < 0 or self._solved > MAX_NODES:
                    raise Refused(f"it would have to travel through more than {self._solved - 1} nodes")
            node = self.graph.nodes[name]
            if name in self.view.protected:
                raise Refused(f"{node.op} {name!r} is {self.view.protected[name]}")
            handler = self._handlers.get(node.op)
            if handler is None:
                raise Refused(self._blocked(node, source))
            try:
                handler(self, node)
            except Refused as refusal:
                raise Refused(_placed(str(refusal), node)) from None

    def _blocked(self, node: NodeDef, source: str) -> str:
        if not source:
            return f"a {self.kind} does not pass back through {node.op} {node.name!r}"
        if len(self.graph.users(source)) > 1:
            producer = self.graph.nodes[source]
            return f"{producer.op} {source!r} also feeds {node.op} {node.name!r}, which a {self.kind} does not pass"
        return f"a {self.kind} does not pass forward through {node.op} {node.name!r}"

    def next_script(self) -> list[int] | None:
        """The choices to try after these; None when all were tried."""
        script = [choice for choice, _ in self.choices]
        while script:
            if script[-1] + 1 < self.choices[len(script) - 1][1]:
                script[-1] += 1
                return script
            script.pop()
        return None


# Nodes with several operands or results are asked last: by then, what is known of them is known.
LATE = frozenset(
    (
        *("Concat", "ConcatV2", "Pack", "Split", "SplitV", "Unpack"),
        *("AddN", "Add", "AddV2", "Sub", "Mul", "RealDiv", "DivNoNan", "SquaredDifference"),
        *("Maximum", "Minimum", "Select", "SelectV2"),
        *("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"),
    )
)


def _placed(reason: str, node: NodeDef) -> str:
    """A reason that says where."""
    return reason if repr(node.name) in reason else f"{node.op} {node.name!r}: {reason}"


def search(view: View, kind: str, goal: str, handlers: Mapping[str, Handler], start: Callable[[Plan], None]) -> Plan:
    """The first plan that works.

    Args:
      view: the graph.
      kind: SCALE or SHIFT.
      goal: the affine node that shall vanish.
      handlers: op -> what it asks of the coefficients around it.
      start: decides the first coefficient.

    Raises:
      Refused: no plan works; the reason is the one of the first try.
    """
    script: list[int] | None = []
    first: Refused | None = None
    for _ in range(MAX_TRIES):
        plan = Plan(view, kind, goal, handlers, script or ())
        try:
            start(plan)
            plan.run()
            return plan
        except Refused as refusal:
            first = first or refusal
        script = plan.next_script()
        if script is None:
            break
    assert first is not None
    raise first


def ratio(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray:
    """a / b for scales, of which None is 1."""
    return divide(np.ones(()) if a is None else a, np.ones(()) if b is None else b)
