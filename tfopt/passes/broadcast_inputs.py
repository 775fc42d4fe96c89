"""broadcast_inputs: has what is the same for all rows of a request sent as one row, and computed once.

    f(tile(u, N), c)   becomes   g(h(u), c)    u: the user, one row;  c: N candidates

The row is repeated as late in the graph as the mathematics allows (`tfopt.serving.late_broadcast`). The client sends
the inputs named as one row, all others as before. Such a signature excludes the batching of a model server: its inputs
do not share their first dimension.
"""

from __future__ import annotations

from tfopt.errors import TfoptError
from tfopt.graph import split
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass
from tfopt.rewrite import Log, Refused
from tfopt.serving.inputs import describe_bytes, groups, matches, placeholders, refusal
from tfopt.serving.late_broadcast.rewrite import LateBroadcast
from tfopt.serving.masked_dense import select_instead

_RULE = "input sent once"


def run(model: Model, log: Log, inputs: str = "") -> None:
    """Makes inputs of one row, in place.

    Args:
      model: the model.
      log: gets which inputs these are, what is computed once, and where rows are repeated and why.
      inputs: globs of input names, separated by commas, such as "user_*"; empty leaves everything as it is.

    Raises:
      TfoptError: no input fits.
    """
    globs = [glob.strip() for glob in inputs.split(",") if glob.strip()]
    if not globs:
        log.notes.append("no input is named: nothing is sent once (inputs=...)")
        return
    before = model.copy()
    for glob in globs:
        if not any(matches(name, [glob]) for signature in model.signatures.values() for name in signature.inputs):
            names = sorted({name for signature in model.signatures.values() for name in signature.inputs})
            raise TfoptError(f"broadcast_inputs: inputs={glob!r} fits no input; the inputs are {', '.join(names)}")
    for names in groups(model):
        chosen = {n: [i for i in model.signatures[n].inputs if matches(i, globs)] for n in names}
        for signature, found in chosen.items():
            for name in list(found):
                if reason := _stays(model, signature, name):
                    log.refused[_RULE, name] = reason
                    found.remove(name)
        if not any(chosen.values()):
            continue
        trial = model.copy()
        own = Log()
        try:
            _send_once(trial, own, names, {n: sorted(found) for n, found in chosen.items()})
        except Refused as reason:
            log.refused[_RULE, names[0]] = str(reason)
            continue
        model.graph, model.signatures, model.requests = trial.graph, trial.signatures, trial.requests
        log.applied.update(own.applied)
        log.refused.update(own.refused)
        log.notes += own.notes
        log.notes.append(describe_bytes(model, before, next(name for name in names if chosen[name])))


def _send_once(model: Model, log: Log, names: list[str], chosen: dict[str, list[str]]) -> None:
    """Rewrites signatures that share inputs; `chosen` has the inputs of each that become one row."""
    once: dict[str, None] = {}
    rows: list[set[str]] = []
    others: set[str] = set()  # inputs of signatures that share some, and have none that is sent once
    for signature in names:
        nodes = placeholders(model, signature)
        for name in chosen[signature]:
            once[nodes[name]] = None
        counting = {nodes[n] for n in nodes if n not in chosen[signature] and not _stays(model, signature, n)}
        if not chosen[signature]:
            others |= counting
        elif counting:
            rows.append(counting)
        else:
            raise Refused(f"signature {signature!r}: all its inputs would be sent once, and none says how many rows")
    common = sorted(set.intersection(*rows) - once.keys())
    candidates = others.union(*rows)
    everywhere = [*common, *sorted(candidates - set(common))]
    if both := once.keys() & candidates:
        raise Refused(f"{both.pop()!r} is sent once in one of the signatures {', '.join(names)}, and not in another")
    if not common:
        raise Refused(f"the signatures {', '.join(names)} share inputs, but none that says how many rows there are")
    apart = [name for name in names if not chosen[name]]
    results = [ref for label, ref in model.graph.outputs.items() if any(label.startswith(f"{name}:") for name in apart)]
    reached = model.graph.reachable(split(ref)[0] for ref in results)
    if selected := select_instead(model.graph, set(once)):
        log.applied["values with a mask stay dense"] += selected
    work = LateBroadcast(model, list(once), everywhere, reached, log)
    work.run()
    log.applied[_RULE] += len(once)
    log.notes.append(
        f"{len(work.worked_once)} of {len(model.graph.nodes)} nodes compute one row; rows are repeated at "
        f"{len(work.repeated())} place{'s' * (len(work.repeated()) != 1)}"
        + "".join(f", {place}" for place in work.repeated()[:5])
    )
    for signature in names:
        for name in chosen[signature]:
            model.signatures[signature].inputs[name].tensor_shape.dim[0].size = 1
        if chosen[signature]:
            model.requests.setdefault(signature, []).append({"step": "once", "inputs": chosen[signature]})
            log.notes.append(
                f"{signature}: {', '.join(chosen[signature])} is one row now, so a model server cannot batch requests "
                "of this signature (inputs must share their first dimension): leave --enable_batching off for it"
            )


def _stays(model: Model, signature: str, name: str) -> str | None:
    """Why an input cannot be sent once, nor say how many rows there are; None where it can."""
    if reason := refusal(model, signature, name):
        return reason
    rows = model.signatures[signature].inputs[name].tensor_shape.dim[0].size
    return None if rows == -1 else f"it has {rows} rows always"


PASS = Pass("broadcast_inputs", run, options={"inputs": ""}, keeps=INVARIANTS, requests=True)
