"""The pure function f(weights, inputs) of a signature, with gradients: what every fine-tuning stands on.

f = differentiable(model, "serving_default")
with tf.GradientTape() as tape:
    loss = my_loss(f(variables, {"image": images})["scores"], labels)
gradients = tape.gradient(loss, variables)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from tfopt.errors import TfoptError
from tfopt.graph import split
from tfopt.inline import label, tensor_names
from tfopt.model import Model

Tensors = Mapping[str, tf.Tensor]

_TABLES = ("HashTableV2", "HashTable", "MutableHashTableV2", "MutableHashTable")
_V1_CONTROL_FLOW = ("Switch", "Merge", "Enter", "Exit", "NextIteration")

# TensorFlow keeps gradient functions by name for the whole process, and tables by their shared name.
_serial = itertools.count()


def differentiable(model: Model, signature: str) -> Callable[[Tensors, Tensors], dict[str, tf.Tensor]]:
    """Makes a signature callable on weights of the caller's, in eager code or in a tf.function.

    Args:
      model: the model; rewriting it afterwards does not change the function.
      signature: which signature.

    Returns:
      f(weights, inputs) -> outputs, all by name. `weights` may leave out names, or give variables: what is not given is
      the model's own value and constant.

    Raises:
      TfoptError: the signature assigns state, or has TF 1 control flow, which has no gradient.
    """
    definition = model.signatures[signature]
    refs = {
        f"{name}:{component}" if component else name: model.graph.outputs[label(signature, name, component)]
        for name, info in definition.outputs.items()
        for component, _ in tensor_names(info)
    }
    inputs = {
        f"{name}:{component}" if component else name: split(tensor)[0]
        for name, info in definition.inputs.items()
        for component, tensor in tensor_names(info)
    }
    live = model.graph.reachable(split(ref)[0] for ref in refs.values())
    for name in live:
        if name in model.state:
            raise TfoptError(f"signature {signature!r} keeps state in {name!r}, so it is no function of its inputs")
        if model.graph.nodes[name].op in _V1_CONTROL_FLOW:
            raise TfoptError(f"signature {signature!r} has TF 1 control flow at {name!r}, which has no gradient")
    suffix = f"__f{next(_serial)}"
    graph_def = _renamed(model, live, suffix)
    own = {name: model.weights[name] for name in live if name in model.weights}
    with tf.init_scope():  # the library must be known to the eager context before a gradient of it is traced
        library = GraphDef(library=graph_def.library, versions=graph_def.versions)
        tf.graph_util.import_graph_def(library, name="")
    if model.init and any(model.graph.nodes[name].op in _TABLES for name in live):
        _initialise_tables(model, suffix)
    order = list(refs)

    @tf.function(autograph=False)
    def call(weights: Tensors, values: Tensors) -> list[tf.Tensor]:
        feeds = {f"{name}:0": weights[name] if name in weights else tf.constant(own[name]) for name in own}
        feeds |= {f"{node}:0": values[name] for name, node in inputs.items() if node in live}
        fetches = [_with_port(refs[name]) for name in order]
        return tf.graph_util.import_graph_def(graph_def, input_map=feeds, return_elements=fetches, name="")

    def function(weights: Tensors, values: Tensors) -> dict[str, tf.Tensor]:
        known = {name: tf.convert_to_tensor(weight) for name, weight in weights.items() if name in own}
        return dict(zip(order, call(known, dict(values)), strict=True))

    return function


def _renamed(model: Model, nodes: set[str], suffix: str) -> GraphDef:
    """The part of the graph that a signature needs, its functions and tables under names of its own."""
    graph_def = GraphDef()
    graph_def.CopyFrom(model.graph.to_graph_def(model.library()))
    kept = [node for node in graph_def.node if node.name in nodes]
    fed = {f"^{node.name}" for node in kept if node.op == "Placeholder"}
    for node in kept:  # what is fed is not in the graph that runs, so nothing can wait for it
        refs = [ref for ref in node.input if ref not in fed]
        del node.input[:]
        node.input.extend(refs)
    graph_def.ClearField("node")
    graph_def.node.extend(kept)
    for function in graph_def.library.function:
        function.signature.name += suffix
    for holder in (graph_def.node, *(f.node_def for f in graph_def.library.function)):
        for node in holder:
            for attr in node.attr.values():
                for func in [attr.func] if attr.HasField("func") else list(attr.list.func):
                    func.name += suffix
            if node.op in _TABLES:
                node.attr["shared_name"].s = f"{node.attr['shared_name'].s.decode() or node.name}{suffix}".encode()
    return graph_def


def _initialise_tables(model: Model, suffix: str) -> None:
    assert model.init is not None
    nodes = model.graph.reachable([model.init])
    graph_def = _renamed(model, nodes, suffix)
    assets = {
        f"{split(asset.tensor_info.name)[0]}:0": str(model.directory / "assets" / asset.filename)
        for asset in model.assets
        if split(asset.tensor_info.name)[0] in nodes
    }

    @tf.function(autograph=False)
    def initialise() -> tf.Tensor:
        feeds = {name: tf.constant(path) for name, path in assets.items()}
        feeds |= {f"{name}:0": tf.constant(model.weights[name]) for name in nodes if name in model.weights}
        (done,) = tf.graph_util.import_graph_def(graph_def, input_map=feeds, return_elements=[model.init], name="")
        with tf.control_dependencies([done]):
            return tf.constant(True)

    initialise()


def _with_port(ref: str) -> str:
    name, port = split(ref)
    return f"{name}:{port}"
