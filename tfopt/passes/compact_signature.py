"""compact_signature: takes the features of a request as tensors, instead of tf.Examples that the graph must parse.

A signature of serialized examples costs a parse on the server and bytes on the wire: every name of every feature in
every row. Here each feature that the model uses is an input of its own, (rows, ...), and the parsing nodes go. What a
client does instead, it does by the steps that this pass writes down (`Model.requests`). Features with a varying number
of values come as values and a mask, or as values and row splits; see `tfopt.serving.sparse_inputs`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.errors import TfoptError
from tfopt.feature_spec import Feature, parsed_features
from tfopt.graph import Graph, join, split
from tfopt.inline import label, tensor_names
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass
from tfopt.rewrite import Log, Refused
from tfopt.serving.sequence_inputs import lists
from tfopt.serving.sparse_inputs import Form, column, masked, of_one_example, placeholder, with_row_splits

_SPARSE = {"mask": masked, "row_splits": with_row_splits}
_PARSERS = ("ParseExample", "ParseExampleV2", "ParseSingleExample", "ParseSequenceExampleV2")
_OTHER_PARSERS = ("ParseSequenceExample", "ParseSingleSequenceExample")  # of TF 1
_PREDICT = "tensorflow/serving/predict"


def run(model: Model, log: Log, sparse: str = "mask", keep_example_signature: bool = False) -> None:
    """Replaces the parsing nodes of the main body by inputs, in place.

    Args:
      model: edited in place.
      log: gets what was done.
      sparse: "mask" or "row_splits"; what features with a varying number of values become.
      keep_example_signature: whether the old signature stays, and the new one is called `<name>_compact`.

    Raises:
      TfoptError: no signature takes examples that the graph parses, or one does, and cannot do without them.
    """
    if sparse not in _SPARSE:
        raise TfoptError(f"compact_signature: sparse must be one of {', '.join(_SPARSE)}; received {sparse!r}")
    groups: dict[str, list[str]] = {}
    for name, signature in model.signatures.items():
        tensors = [tensor for info in signature.inputs.values() for _, tensor in tensor_names(info)]
        if len(tensors) == 1 and _is_string(model.graph.producer(tensors[0])):
            groups.setdefault(split(tensors[0])[0], []).append(name)
    for source, names in groups.items():
        try:
            parsers = _parsers(model.graph, source)
            _check_features(model.graph, source, parsers)
        except Refused as reason:
            log.refused["tf.Example", source] = str(reason)
            continue
        if keep_example_signature:
            source, names = _clone(model, source, names)
            parsers = _parsers(model.graph, source)
        try:
            _replace(model, log, source, parsers, names, sparse)
        except Refused as reason:  # found while the graph was edited: it cannot be left out any more
            raise TfoptError(f"compact_signature: {source}: {reason}") from reason
    if not log.applied:
        why = "; ".join(f"{node}: {reason}" for (_, node), reason in log.refused.items())
        raise TfoptError(
            f"compact_signature: {why or 'no signature takes serialized tf.Examples, so there is nothing to do'}"
        )
    model.graph.sweep()


def _is_string(node: NodeDef) -> bool:
    return node.op == "Placeholder" and node.attr["dtype"].type == tf.string.as_datatype_enum


def _parsers(graph: Graph, source: str) -> list[str]:
    """The parsing nodes behind an input; whatever else reads it may ask for the number of rows alone."""
    found, pending = [], [source]
    while pending:
        name = pending.pop()
        if graph.output_labels(name):
            raise Refused("the examples themselves are an output")
        for user in graph.users(name):
            op = graph.nodes[user].op
            if op in _PARSERS:
                found.append(user)
            elif op == "Identity":
                pending.append(user)
            elif op in _OTHER_PARSERS:
                raise Refused(f"{op} ({user}) of TensorFlow 1 is not taken apart; {', '.join(_PARSERS)} are")
            elif op not in ("Shape", "Size", "NoOp"):
                raise Refused(f"node {user!r} ({op}) reads the serialized examples too")
    if _is_single(graph, source) and any(graph.nodes[name].op == "ParseSequenceExampleV2" for name in found):
        raise Refused("a single SequenceExample is not taken apart; batches of them are")
    if not found:
        raise Refused("no parsing node of the main body reads this string input")
    return found


def _is_single(graph: Graph, source: str) -> bool:
    """Whether an input is one serialized example: its features have no axis of rows."""
    shape = graph.nodes[source].attr["shape"].shape
    return not shape.unknown_rank and not shape.dim


def _check_features(graph: Graph, source: str, parsers: list[str]) -> None:
    found: set[str] = set()
    for parser in parsers:
        for feature in parsed_features(graph, graph.nodes[parser]):
            if feature.kind == "ragged" and _is_single(graph, source):
                raise Refused(f"feature {feature.name!r} is a ragged one of a single example")
            if feature.name in found:
                raise Refused(f"feature {feature.name!r} is parsed twice")
            found.add(feature.name)


def _replace(
    model: Model,
    log: Log,
    source: str,
    parsers: list[str],
    names: list[str],
    sparse: str,
) -> None:
    graph, single = model.graph, _is_single(model.graph, source)
    forms: dict[str, Form] = {}
    unused, needed = [], graph.reachable(graph.roots())
    for parser in parsers:
        for feature in parsed_features(graph, graph.nodes[parser]):
            if not _is_used(graph, parser, feature, needed):
                unused.append(feature.name)
                continue
            forms[feature.name] = _form(graph, parser, feature, sparse, single, log)
    if not forms:
        raise Refused("no feature of the examples is used")
    inputs = {name: place for form in forms.values() for name, place in form.inputs.items()}
    _count_rows(graph, source, forms)
    for parser in parsers:
        graph.redirect_control(parser, [])
    graph.arguments = [name for name in graph.arguments if name != source]
    graph.arguments += [split(ref)[0] for ref, _ in inputs.values()]
    steps = [form.step for form in forms.values() if form.step]
    described = {name: form.feature for name, form in forms.items()}
    for name in names:
        signature = model.signatures[name]
        (old,) = signature.inputs
        model.requests[name] = [{"step": "features", "input": old, "features": described, "single": single}, *steps]
        del signature.inputs[old]
        for key, (ref, shape) in inputs.items():
            info = signature.inputs[key]
            info.name = f"{split(ref)[0]}:0"
            info.dtype = graph.nodes[split(ref)[0]].attr["dtype"].type
            info.tensor_shape.CopyFrom(tf.TensorShape([None if d < 0 else d for d in shape]).as_proto())
        if signature.method_name != _PREDICT:
            kind = signature.method_name.rpartition("/")[2]
            log.notes.append(f"signature {name!r} answers Predict now: {kind} requests hold tf.Examples")
            signature.method_name = _PREDICT
        log.applied["signature"] += 1
    if unused:
        log.notes.append(f"features that no output depends on, and clients no longer send: {', '.join(sorted(unused))}")


def _is_used(graph: Graph, parser: str, feature: Feature, needed: set[str]) -> bool:
    ports = set(feature.ports.values())
    return any(used in ports and user in needed for user, _, used in graph.uses(parser)) or any(
        split(ref)[0] == parser and split(ref)[1] in ports for ref in graph.outputs.values()
    )


def _form(graph: Graph, parser: str, feature: Feature, sparse: str, single: bool, log: Log) -> Form:
    if feature.kind in ("fixed", "padded"):
        of_row = feature.shape if feature.kind == "fixed" else (-1, *feature.shape)
        shape = of_row if single else (-1, *of_row)
        ref = placeholder(graph, feature.name, feature.dtype, shape)
        graph.redirect(join(parser, feature.ports["values"]), ref)
        described: dict[str, Any] = {"dtype": feature.dtype.name, "shape": list(of_row)}
        if feature.default is not None:
            described["default"] = _plain(feature.default)
        log.applied[f"{feature.kind} feature"] += 1
        return Form({feature.name: (ref, shape)}, described)
    if feature.kind.endswith("lists"):
        log.applied["feature list"] += 1
        return lists(graph, feature, parser)
    if single:
        log.applied["sparse feature of a single example"] += 1
        return of_one_example(graph, feature, parser)
    form = column(graph, feature, parser) if feature.kind == "sparse" else None
    if form is not None:
        log.applied["sparse feature of one value, with a mask" if form.step else "sparse feature with a default"] += 1
        return form
    log.applied[f"{feature.kind} feature as {'values and mask' if sparse == 'mask' else 'values and row splits'}"] += 1
    return _SPARSE[sparse](graph, feature, parser)


def _plain(value: np.ndarray) -> Any:
    """JSON's form of a default: bytes as text."""
    nested = value.tolist()
    if value.dtype != object:
        return nested
    flat = [v.decode() for v in value.reshape(-1)]
    return np.array(flat, object).reshape(value.shape).tolist()


def _count_rows(graph: Graph, source: str, forms: dict[str, Form]) -> None:
    """Answers Shape and Size of the serialized examples by the rows of a feature."""
    counted = next(
        (
            ref
            for form in forms.values()
            for ref, shape in form.inputs.values()
            if len(shape) > 1 or (form.step or {}).get("step") != "split"
        ),
        None,
    )
    pending = [source]
    while pending:
        for user in graph.users(pending.pop()):
            node = graph.nodes[user]
            if node.op == "Identity":
                pending.append(user)
            elif node.op in ("Shape", "Size") and (graph.users(user) or graph.output_labels(user)):
                if counted is None:
                    raise Refused("the number of rows is asked for, and no input has one row for each example")
                graph.redirect(user, _rows(graph, counted, node))


def _rows(graph: Graph, ref: str, asked: NodeDef) -> str:
    out = tf.as_dtype(asked.attr["out_type"].type or tf.int32.as_datatype_enum)
    dtype = tf.as_dtype(graph.producer(ref).attr["dtype"].type)
    shape = graph.add_op(f"{ref}/shape", "Shape", [ref], T=dtype, out_type=out)
    begin, end, step = (
        graph.add_constant(f"{ref}/{n}", np.array([v], np.int32)) for n, v in zip("bes", (0, 1, 1), strict=True)
    )
    shrink = 1 if asked.op == "Size" else 0
    return graph.add_op(
        f"{ref}/rows", "StridedSlice", [shape, begin, end, step], T=out, Index=tf.int32, shrink_axis_mask=shrink
    )


def _clone(model: Model, source: str, names: list[str]) -> tuple[str, list[str]]:
    """Copies everything that depends on an input, for signatures of their own; weights and tables are shared."""
    graph = model.graph
    wanted = {k: ref for k, ref in graph.outputs.items() if k.split(":")[0] in names}
    needed = graph.reachable(split(ref)[0] for ref in wanted.values())
    depends = needed & graph.dependents([source]) | {source}
    copies = {name: graph.unique_name(f"compact/{name}") for name in depends}
    for node in [node for node in graph.topological() if node.name in depends]:
        clone = NodeDef()
        clone.CopyFrom(node)
        clone.name = copies[node.name]
        refs = [join(copies.get(split(ref)[0], split(ref)[0]), split(ref)[1]) for ref in node.input]
        del clone.input[:]
        clone.input.extend(refs)
        graph.add(clone)
    graph.arguments.append(copies[source])
    new_names = []
    for name in names:
        new = f"{name}_compact"
        if new in model.signatures:
            raise TfoptError(f"compact_signature: the model has a signature {new!r} already; rename it")
        signature = model.signatures[new] = type(model.signatures[name])()
        signature.CopyFrom(model.signatures[name])
        for info in signature.inputs.values():
            info.name = f"{copies[source]}:0"
        for output, info in signature.outputs.items():
            for component, _ in tensor_names(info):
                producer, port = split(graph.outputs[label(name, output, component)])
                graph.outputs[label(new, output, component)] = join(copies.get(producer, producer), port)
        model.stands_for[new] = name
        new_names.append(new)
    return copies[source], new_names


PASS = Pass(
    "compact_signature",
    run,
    needs=("prune_graph", "fold_constants"),  # before them, control edges hide what is constant
    options={"sparse": "mask", "keep_example_signature": False},
    keeps=INVARIANTS,
    requests=True,
)
