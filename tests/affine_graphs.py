"""Graphs for the tests of affine folding, and the comparison before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from tests.conftest import randomise_batch_norms
from tfopt.graph import Graph, infer_shapes, split
from tfopt.passes.fold_affine import fold_affine, leftovers
from tfopt.rewrite import Log, remove_node

TOLERANCE = 1e-5


def frozen(function: Callable, *specs: tf.TensorSpec) -> Graph:
    """A function, or a Keras model, as a graph of constants without Identity nodes."""
    return frozen_with_library(function, *specs)[0]


def frozen_with_library(function: Callable, *specs: tf.TensorSpec) -> tuple[Graph, list[FunctionDef]]:
    """The same, with the functions that its loops and branches call."""
    concrete = tf.function(function).get_concrete_function(*specs)
    concrete = convert_variables_to_constants_v2(concrete, lower_control_flow=False)
    nodes = [node for node in concrete.graph.as_graph_def().node if node.op != "NoOp"]
    for node in nodes:
        data = [ref for ref in node.input if not ref.startswith("^")]
        del node.input[:]
        node.input.extend(data)
        for key in ("_output_shapes", "_has_manual_control_dependencies"):
            if key in node.attr:
                del node.attr[key]
    outputs = {str(i): tensor.name for i, tensor in enumerate(concrete.outputs)}
    graph = Graph(nodes, outputs, arguments=[tensor.op.name for tensor in concrete.inputs])
    for node in list(graph.nodes.values()):
        if node.op == "Identity":
            remove_node(graph, node.name, node.input[0])
            graph.remove(node.name)
    graph.sweep()
    return graph, list(concrete.graph.as_graph_def().library.function)


def run(graph: Graph, feeds: Sequence[np.ndarray], library: Sequence[FunctionDef] = ()) -> list[np.ndarray]:
    """Runs a graph in a v1 session; `feeds` are the values of its arguments, in order."""
    with tf.Graph().as_default() as imported:
        tf.graph_util.import_graph_def(graph.to_graph_def(library), name="")
        values = {f"{name}:0": value for name, value in zip(graph.arguments, feeds, strict=True)}
        values |= {f"{name}:0": value for name, value in graph.weights.items()}
        with tf.compat.v1.Session(graph=imported) as session:
            return session.run(["{}:{}".format(*split(ref)) for ref in graph.outputs.values()], values)


def inputs_of(graph: Graph, seed: int = 0, rows: int = 3) -> list[np.ndarray]:
    """Random values for the arguments of a graph."""
    rng = np.random.default_rng(seed)
    feeds = []
    for name in graph.arguments:
        shape = [rows if d.size < 0 else d.size for d in graph.nodes[name].attr["shape"].shape.dim]
        dtype = tf.as_dtype(graph.nodes[name].attr["dtype"].type)
        value = rng.normal(0.3, 1, shape) if dtype.is_floating else rng.integers(0, 5, shape)
        feeds.append(value.astype(dtype.as_numpy_dtype))
    return feeds


def fold(graph: Graph, feeds: Sequence[np.ndarray] | None = None, library: Sequence[FunctionDef] = ()) -> Log:
    """Folds a graph in place, and checks that its results are the same and that it has not grown."""
    feeds = inputs_of(graph) if feeds is None else feeds
    before, count, left = run(graph, feeds, library), len(graph.nodes), len(left_of(graph, library))
    log = Log()
    fold_affine(graph, library, log)
    graph.topological()
    for old, new in zip(before, run(graph, feeds, library), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype
        if old.dtype.kind == "f":
            assert np.isfinite(new).all()
            assert np.abs(old - new).max(initial=0) <= TOLERANCE * np.abs(old).max(initial=1e-30)
        else:
            np.testing.assert_array_equal(old, new)
    assert len(graph.nodes) <= count
    assert len(left_of(graph, library)) <= left
    for name, _ in left_of(graph, library):
        assert log.refused["fold_affine", name]
    return log


def left_of(graph: Graph, library: Sequence[FunctionDef] = ()) -> list[tuple[str, str]]:
    """The affine nodes that are left in a graph."""
    return leftovers(graph, infer_shapes(graph, library))


def ops(graph: Graph) -> list[str]:
    """The ops of a graph in order, without constants and arguments."""
    return [node.op for node in graph.topological() if node.op not in ("Const", "Placeholder")]


def model_of(shape, *stack) -> Graph:
    """A sequential model with batch norms that have something to do, frozen."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Input(shape), *stack])
    return settled(model)


def settled(model: keras.Model) -> Graph:
    randomise_batch_norms(model)
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name in ("bias", "beta", "gamma") and "normalization" not in weight.path:
            weight.assign(rng.normal(0.5, 0.3, weight.shape).astype("float32"))
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in model.inputs]
    return frozen(model if len(specs) == 1 else lambda *x: model(list(x)), *specs)


def norm() -> keras.layers.Layer:
    return keras.layers.BatchNormalization()
