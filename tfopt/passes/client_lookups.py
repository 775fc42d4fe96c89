"""client_lookups: lets clients send the number that a string stands for in a vocabulary, instead of the string.

A string x that the graph takes element by element to an integer f(x) (a table's lookup, a bucket for what is not in it)
is replaced by f(x): f is tabulated over the vocabulary, and the table goes to the client. What is in no vocabulary has
one number f(oov), or else, where it is hashed into several, the string must stay.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.graph import Graph, infer_shapes, split
from tfopt.inline import label
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass
from tfopt.rewrite import Log, Refused
from tfopt.serving.sparse_inputs import ELEMENTWISE

_RULE = "lookup by the client"
_FREE = ("Reshape", "Squeeze", "ExpandDims")  # do not move elements past each other
_HASHES = ("StringToHashBucketFast", "StringToHashBucket", "StringToHashBucketStrong")
_FILLS = ("InitializeTable", "LookupTableImport")
_PROBES = (b"\x00not in any vocabulary", b"\x01neither is this", b"\x02nor this")


def run(model: Model, log: Log, inputs: str = "", max_vocabulary: int = 100_000) -> None:
    """Replaces string inputs by integer ones, in place.

    Args:
      model: edited in place.
      log: gets what was done.
      inputs: globs of the names of inputs, with commas; "" leaves all as they are.
      max_vocabulary: tables of more entries stay on the server.

    Raises:
      TfoptError: no input has one of these names.
    """
    globs = [glob for glob in inputs.split(",") if glob]
    found: dict[str, list[str]] = {}
    for signature, definition in model.signatures.items():
        for name, info in definition.inputs.items():
            if any(fnmatch.fnmatchcase(name, glob) for glob in globs) and info.dtype == tf.string.as_datatype_enum:
                found.setdefault(split(info.name)[0], []).append(signature)
    if globs and not found:
        raise TfoptError(f"client_lookups: no string input is called {inputs!r}")
    for source, names in found.items():
        key = next(k for k, info in model.signatures[names[0]].inputs.items() if split(info.name)[0] == source)
        try:
            size = _replace(model, source, key, names, max_vocabulary)
        except Refused as reason:
            log.refused[_RULE, source] = str(reason)
            continue
        log.applied[_RULE] += 1
        log.notes.append(f"input {key!r}: clients send numbers, by a table of {size} entries in signatures.json")


def _replace(model: Model, source: str, key: str, names: list[str], limit: int) -> int:
    graph = model.graph
    if any(split(info.name)[0] == source and k != key for n in names for k, info in model.signatures[n].inputs.items()):
        raise Refused("signatures call it by different names")
    number = _number(graph, source)
    tokens = sorted(set(_vocabulary(model, source, number)))
    if len(tokens) > limit:
        raise Refused(f"its vocabulary has {len(tokens)} entries, and max_vocabulary is {limit}")
    values = _tabulate(model, source, number, np.array([*tokens, *_PROBES], object))
    others = set(values[len(tokens) :].tolist())
    if len(others) > 1:
        raise Refused("what is in no vocabulary is hashed into several buckets")
    shape = _shape(model, source, number)
    dtype = tf.as_dtype(values.dtype)
    ref = graph.add_op(f"{source}_id", "Placeholder", (), dtype=dtype, shape=shape)
    graph.redirect(number, ref)
    graph.arguments = [ref if name == source else name for name in graph.arguments]
    table = {token.decode("utf-8", "surrogateescape"): int(v) for token, v in zip(tokens, values, strict=False)}
    step = {
        **{"step": "lookup", "input": key, "table": table, "default": int(others.pop())},
        **{"dtype": dtype.name, "shape": list(shape[1:])},
    }
    for name in names:
        info = model.signatures[name].inputs[key]
        info.name, info.dtype = f"{ref}:0", dtype.as_datatype_enum
        info.tensor_shape.CopyFrom(tf.TensorShape(shape).as_proto())
        model.requests.setdefault(name, []).append(step)
    graph.sweep()
    return len(table)


def _shape(model: Model, source: str, number: str) -> tuple[int | None, ...]:
    """The shape of a number; TensorFlow does not infer that of a lookup, which is that of its keys."""
    shapes = infer_shapes(model.graph, model.library())
    way, pending = _reached(model.graph, source, (number,)), [number]
    for name in pending:
        shape = shapes[name]
        if shape and None not in shape[1:]:
            return shape
        if model.graph.nodes[name].op not in _FREE:  # element by element: its operands have its shape
            pending += [each for each in map(_name, model.graph.nodes[name].input) if each in way - set(pending)]
    raise Refused(f"the shape of {number!r} is not known")


def _name(ref: str) -> str:
    return split(ref)[0]


def _number(graph: Graph, source: str) -> str:
    """The first integer that every path from a string goes through, element by element."""
    inside = _reached(graph, source, ())
    for node in graph.topological():
        if node.name not in inside or node.name == source:
            continue
        if node.op in (*_FREE, "Identity", "StringLower", "StringUpper", "StringStrip"):
            continue
        before = _reached(graph, source, (node.name,))
        ends = [name for name in before if name != node.name and _leaves(graph, name, before)]
        if not ends and _is_integer(graph, node.name):
            return node.name
    raise Refused("it goes elsewhere than through a lookup to one number")


def _reached(graph: Graph, source: str, stop: tuple[str, ...]) -> set[str]:
    """What depends on the string element by element, as far as `stop`."""
    found, pending = {source}, [source]
    while pending:
        name = pending.pop()
        for user in graph.users(name) if name not in stop else ():
            if user not in found and graph.nodes[user].op in (*ELEMENTWISE, *_FREE, "ZerosLike"):
                found.add(user)
                pending.append(user)
    return found


def _leaves(graph: Graph, name: str, inside: set[str]) -> bool:
    return bool(graph.output_labels(name)) or any(user not in inside for user in graph.users(name))


def _is_integer(graph: Graph, name: str) -> bool:
    node = graph.nodes[name]
    attr = {"Cast": "DstT", "LookupTableFindV2": "Tout", "LookupTableFind": "Tout"}.get(node.op, "T")
    return node.op in _HASHES or (attr in node.attr and tf.as_dtype(node.attr[attr].type) in (tf.int64, tf.int32))


def _vocabulary(model: Model, source: str, number: str) -> Iterator[bytes]:
    """The keys of every table on the way to a number."""
    graph = model.graph
    way = _reached(graph, source, (number,)) & graph.reachable([number])
    tables = {
        split(graph.nodes[name].input[0])[0] for name in way if graph.nodes[name].op.startswith("LookupTableFind")
    }
    if not tables:
        raise Refused("no table is looked up on its way")
    for table in tables:
        if graph.producer(table).op.startswith("Mutable"):
            raise Refused(f"table {table!r} may change")
        fills = [
            node
            for node in graph.nodes.values()
            if node.op.startswith(_FILLS) and _identity(graph, node.input[0]) == _identity(graph, table)
        ]
        if not fills:
            raise Refused(f"the keys of table {table!r} are not known: nothing initialises it")
        for fill in fills:  # several of them with the same keys, where signatures share a table
            yield from _keys(model, fill)


def _identity(graph: Graph, ref: str) -> tuple[bytes, str]:
    """What makes two nodes the same table: TensorFlow finds a table by its shared name, where it has one."""
    node = graph.producer(ref)
    while node.op == "Identity":
        node = graph.producer(node.input[0])
    shared = node.attr["shared_name"].s
    return shared, "" if shared else node.name


def _keys(model: Model, fill: NodeDef) -> list[bytes]:
    if not fill.op.startswith("InitializeTableFromTextFile"):
        keys = model.graph.constant(fill.input[1])
        if keys is None or keys.dtype != object:
            raise Refused(f"the keys that {fill.name!r} gives a table are no constant strings")
        return keys.reshape(-1).tolist()
    if fill.attr["key_index"].i != -2 or fill.attr["offset"].i:
        raise Refused(f"the keys that {fill.name!r} gives a table are not whole lines of its file")
    return _lines(model, fill.input[1])


def _lines(model: Model, ref: str) -> list[bytes]:
    read = model.graph.producer(ref)
    if read.op == "ReadVariableOp":  # a tf.Module keeps the path in a variable
        handle = split(read.input[0])[0]
        assigns = [model.graph.nodes[user] for user in model.graph.users(handle)]
        ref = next((node.input[1] for node in assigns if node.op == "AssignVariableOp"), ref)
        while model.graph.producer(ref).op == "Identity":
            ref = model.graph.producer(ref).input[0]
    asset = next((a for a in model.assets if split(a.tensor_info.name)[0] == split(ref)[0]), None)
    if asset is None:
        raise Refused(f"the file of {ref!r} is not an asset")
    return (model.directory / "assets" / asset.filename).read_bytes().splitlines()


def _tabulate(model: Model, source: str, number: str, tokens: np.ndarray) -> np.ndarray:
    """Runs the graph from the string to the number, on many strings at once."""
    part = model.copy()
    signature = type(next(iter(model.signatures.values())))()
    signature.inputs["x"].name = f"{source}:0"
    signature.outputs["y"].name = number
    part.signatures, part.requests = {"tabulate": signature}, {}
    part.graph.outputs = {label("tabulate", "y", ""): number}
    shape = [d.size for d in part.graph.nodes[source].attr["shape"].shape.dim]
    if any(size not in (-1, 1) for size in shape):
        raise Refused(f"it has {shape} values a row")
    part.graph.sweep()
    with Function(part) as function:
        values = function("tabulate", {"x": tokens.reshape([-1, *[1] * (len(shape) - 1)])})["y"]
    return values.reshape(-1)


PASS = Pass(
    "client_lookups",
    run,
    options={"inputs": "", "max_vocabulary": 100_000},
    needs=("prune_graph", "fold_constants"),
    keeps=INVARIANTS,
)
