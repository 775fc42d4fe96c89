"""Ops that give back their input: y = x at serving time.

Identity and its kin carry a name, a gradient, a check or a debugging hook, and compute nothing. `remove_node` in the
engine keeps what hangs on them by control edges.
"""

from __future__ import annotations

from tfopt.rewrite import Match, Op, Refused, Rule

# op -> what it is for besides handing its first input on
PASS_THROUGH = {
    "Identity": "identity",
    "DebugIdentity": "identity",
    "DebugIdentityV2": "identity",
    "Snapshot": "identity",
    "StopGradient": "training-only",
    "PreventGradient": "training-only",
    "PlaceholderWithDefault": "default of an input that no signature feeds",
    "CheckNumerics": "check",
    "CheckNumericsV2": "check",
    "Print": "print",
}


def _first_input(match: Match) -> str:
    graph, node = match.graph, match.root
    if node.name in graph.arguments:
        raise Refused(f"{node.op} {node.name!r} is an input of a signature")
    return node.input[0]


RULES = tuple(Rule(f"{op} ({purpose})", Op(op), _first_input) for op, purpose in PASS_THROUGH.items())
