"""The inputs of signatures that passes may change: which Placeholders they are, and which signatures share them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from tfopt.graph import split
from tfopt.inline import tensor_names
from tfopt.model import Model
from tfopt.serving.predict_bytes import example_arrays, predict_bytes

EXAMPLE_ROWS = 100  # of the requests whose bytes are noted


def placeholders(model: Model, signature: str) -> dict[str, str]:
    """Name of each dense input of a signature -> its Placeholder."""
    inputs = model.signatures[signature].inputs
    return {n: split(inputs[n].name)[0] for n in sorted(inputs) if inputs[n].WhichOneof("encoding") == "name"}


def ragged(model: Model, signature: str) -> set[str]:
    """Inputs whose first dimension is not that of the rows: the values of all rows, and where each row begins."""
    steps = [step for step in model.requests.get(signature, []) if step["step"] == "split"]
    return {step[part] for step in steps for part in ("input", "row_splits")}


def groups(model: Model) -> list[list[str]]:
    """Signatures that share Placeholders, together, in the order of the model."""
    found: list[tuple[set[str], list[str]]] = []
    for name in model.signatures:
        nodes = {split(t)[0] for info in model.signatures[name].inputs.values() for _, t in tensor_names(info)}
        sharing = [group for group in found if group[0] & nodes]
        merged = (nodes.union(*(group[0] for group in sharing)), [n for group in sharing for n in group[1]] + [name])
        found = [group for group in found if group not in sharing] + [merged]
    return [names for _, names in found]


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a name fits one of the patterns; case matters."""
    return any(fnmatchcase(name, glob) for glob in globs)


def refusal(model: Model, signature: str, name: str) -> str | None:
    """Why an input of a signature must stay as it is; None where it need not."""
    info = model.signatures[signature].inputs[name]
    if info.WhichOneof("encoding") != "name":
        return "it is a sparse or ragged input"
    if name in ragged(model, signature):
        return "its rows have different lengths"
    node = model.graph.nodes[split(info.name)[0]]
    if node.op != "Placeholder":
        return f"it is a {node.op}"
    if info.tensor_shape.unknown_rank or not info.tensor_shape.dim:
        return "it has no dimension of rows that is known"
    return None


def describe_bytes(model: Model, before: Model, signature: str) -> str:
    """A remark on the bytes of a request before and after a pass; signatures that share inputs are alike."""
    try:
        then, now = (
            [predict_bytes(signature, example_arrays(m.signatures[signature], rows)) for rows in (1, EXAMPLE_ROWS)]
            for m in (before, model)
        )
    except ImportError:
        return f"{signature}: the bytes of a request were not counted: tensorflow-serving-api is not installed"
    return (
        f"{signature}: a request of {EXAMPLE_ROWS} rows takes {now[1]:,} bytes, before {then[1]:,}; "
        f"of one row {now[0]:,}, before {then[0]:,}"
    )
