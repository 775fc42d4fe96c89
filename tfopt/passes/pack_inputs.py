"""pack_inputs: has single numbers of each row sent as the columns of one tensor for each dtype.

    x_0 (rows,), x_1 (rows,), ..   become   (rows, columns)

Each input of a request costs its name, its shape, and a copy in the server. Where the graph puts the columns together
again, in any order, the packed tensor has them in this order, and what is done to each of them is done to all at once.
"""

from __future__ import annotations

import tensorflow as tf

from tfopt.errors import TfoptError
from tfopt.graph import make_node
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass
from tfopt.rewrite import Log
from tfopt.serving.columns import joins, order, rejoin, take_apart
from tfopt.serving.inputs import describe_bytes, groups, placeholders, refusal

_RULE = "input packed"
_NAMES = {"float32": "float", "int64": "int"}
# Signature -> name of the input there, of one Placeholder.
_Uses = dict[str, str]


def run(model: Model, log: Log, min_inputs: int = 2, max_width: int = 1) -> None:
    """Packs inputs, in place.

    Args:
      model: the model.
      log: gets what was packed into what, and what was not.
      min_inputs: fewer inputs of a dtype stay as they are.
      max_width: the longest vector of a row that is packed; 1 packs single numbers only.

    Raises:
      TfoptError: an option out of its range.
    """
    for option, value, bound in (("min_inputs", min_inputs, 2), ("max_width", max_width, 1)):
        if value < bound:
            raise TfoptError(f"pack_inputs: {option}={value}: must be at least {bound}")
    before = model.copy()
    changed: dict[str, None] = {}
    for names in groups(model):
        for key, uses in _alike(model, log, names, max_width).items():
            if len(uses) >= min_inputs:
                _pack(model, log, tf.as_dtype(key[0]), key[1], uses)
                changed[next(iter(next(iter(uses.values()))))] = None
    log.notes += [describe_bytes(model, before, name) for name in changed]


def _alike(
    model: Model, log: Log, names: list[str], max_width: int
) -> dict[tuple[int, int, tuple[str, ...]], dict[str, _Uses]]:
    """The inputs of one dtype, one number of rows and the same signatures: Placeholder -> its uses."""
    uses: dict[str, _Uses] = {}
    for signature in names:
        for name, node in placeholders(model, signature).items():
            if signature in uses.get(node, ()):
                raise TfoptError(f"pack_inputs: signature {signature!r} has two names for {node!r}, one is {name!r}")
            if reason := refusal(model, signature, name):
                log.refused[_RULE, node] = reason
            else:
                uses.setdefault(node, {})[signature] = name
    alike: dict[tuple[int, int, tuple[str, ...]], dict[str, _Uses]] = {}
    for node, own in uses.items():
        signature, name = next(iter(own.items()))
        info = model.signatures[signature].inputs[name]
        dims = [d.size for d in info.tensor_shape.dim]
        if len(dims) > 2 or (len(dims) == 2 and not 0 < dims[1] <= max_width):
            continue
        alike.setdefault((info.dtype, dims[0], tuple(own)), {})[node] = own
    return alike


def _pack(model: Model, log: Log, dtype: tf.DType, rows: int, uses: dict[str, _Uses]) -> None:
    graph = model.graph
    shapes = {node: graph.nodes[node].attr["shape"].shape.dim for node in uses}
    for node, own in uses.items():
        signature, name = next(iter(own.items()))
        shapes[node] = model.signatures[signature].inputs[name].tensor_shape.dim
    ranks = {node: len(dims) for node, dims in shapes.items()}
    widths = {node: dims[1].size if len(dims) == 2 else 1 for node, dims in shapes.items()}
    found = joins(graph, widths, ranks)
    columns = order(list(uses), found)
    signatures = list(next(iter(uses.values())))
    into = _free_name(model, signatures, f"{'once_' if rows == 1 else ''}{_NAMES.get(dtype.name, dtype.name)}_features")
    total = sum(widths.values())
    packed = graph.add(
        make_node(graph.unique_name(into), "Placeholder", dtype=dtype, shape=(None if rows < 0 else rows, total))
    )
    starts, start = {}, 0
    for node in columns:
        starts[node] = start
        start += widths[node]
    gone = rejoin(graph, packed, dtype, starts, widths, found)
    graph.arguments = [name for name in graph.arguments if name not in uses] + [packed]
    graph.sweep()
    if any(graph.users(node) or graph.output_labels(node) for node in uses if node in graph.nodes):
        take_apart(graph, packed, dtype, columns, widths, ranks)
    for signature in signatures:
        inputs = model.signatures[signature].inputs
        sent = [uses[node][signature] for node in columns]
        for name in sent:
            del inputs[name]
        inputs[into].name = f"{packed}:0"
        inputs[into].dtype = dtype.as_datatype_enum
        inputs[into].tensor_shape.CopyFrom(tf.TensorShape((None if rows < 0 else rows, total)).as_proto())
        model.requests.setdefault(signature, []).append({"step": "pack", "into": into, "from": sent})
    graph.sweep()
    log.applied[_RULE] += len(columns)
    if gone:
        log.applied["column that is not put back"] += gone
    log.notes.append(
        f"{', '.join(signatures)}: {into} ({rows if rows > 0 else 'rows'}, {total}) holds {', '.join(sent)}"
    )


def _free_name(model: Model, signatures: list[str], wanted: str) -> str:
    taken = {name for signature in signatures for name in model.signatures[signature].inputs}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


PASS = Pass("pack_inputs", run, options={"min_inputs": 2, "max_width": 1}, keeps=INVARIANTS, requests=True)
