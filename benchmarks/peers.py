"""What tfopt is measured against: each peer turns a SavedModel directory into a graph with named inputs and outputs.

Peers handle one signature; `pick_signature` says which. What a peer cannot do it says by its own exception.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, saved_model_pb2

v1 = tf.compat.v1

# Graph Transform Tool: its documentation's recipe for optimising for deployment.
GRAPH_TRANSFORMS = (
    "strip_unused_nodes remove_nodes(op=Identity, op=CheckNumerics) fold_constants(ignore_errors=true) "
    "fold_batch_norms fold_old_batch_norms sort_by_execution_order"
)
GRAPPLER_OPTIMIZERS = ("pruning", "constfold", "arithmetic", "dependency")


@dataclass
class Candidate:
    """What a session can run: a frozen graph, or a SavedModel directory; with one signature's tensors.

    `inputs` and `outputs` map the signature's names to tensor names such as "x:0".
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    graph: graph_pb2.GraphDef
    directory: str | None = None
    notes: list[str] = field(default_factory=list)
    refusals: dict[str, list[str]] = field(default_factory=dict)  # node -> why tfopt left it

    @property
    def bytes(self) -> int:
        """Size on disk: the directory's files, or the serialized graph."""
        if self.directory is None:
            return self.graph.ByteSize()
        return sum(x.stat().st_size for x in Path(self.directory).rglob("*") if x.is_file())


def read_meta_graph(directory: str) -> meta_graph_pb2.MetaGraphDef:
    """Returns the serving MetaGraphDef of a SavedModel."""
    saved = saved_model_pb2.SavedModel.FromString((Path(directory) / "saved_model.pb").read_bytes())
    return next(x for x in saved.meta_graphs if "serve" in x.meta_info_def.tags)


def pick_signature(signatures: Mapping) -> str:
    """Returns serving_default, or the first signature that takes data."""
    if "serving_default" in signatures:
        return "serving_default"
    return next(key for key in sorted(signatures) if signatures[key].inputs)


def serving(directory: str, signature: str | None = None) -> Candidate:
    """Returns a SavedModel as it is: how the original and tfopt's output are run and counted."""
    meta = read_meta_graph(directory)
    chosen = meta.signature_def[signature or pick_signature(meta.signature_def)]
    inputs = {key: info.name for key, info in chosen.inputs.items()}
    outputs = {key: info.name for key, info in chosen.outputs.items()}
    return Candidate(inputs, outputs, meta.graph_def, directory)


def frozen(directory: str, signature: str | None = None) -> Candidate:
    """TensorFlow's own freezing: convert_variables_to_constants_v2, or its TF1 ancestor for TF1 models."""
    meta = read_meta_graph(directory)
    name = signature or pick_signature(meta.signature_def)
    chosen = meta.signature_def[name]
    notes = [f"1 of {_signature_count(meta)} signatures"] if _signature_count(meta) > 1 else []
    if not meta.HasField("object_graph_def"):
        with v1.Session(graph=tf.Graph()) as session:
            v1.saved_model.load(session, ["serve"], directory)
            nodes = [info.name.split(":")[0] for info in chosen.outputs.values()]
            graph = v1.graph_util.convert_variables_to_constants(session, session.graph_def, nodes)
        inputs = {key: info.name for key, info in chosen.inputs.items()}
        return Candidate(inputs, {k: info.name for k, info in chosen.outputs.items()}, graph, notes=notes)

    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    loaded = tf.saved_model.load(directory)  # kept alive: signatures hold their variables weakly
    function = loaded.signatures[name]
    result = convert_variables_to_constants_v2(function, lower_control_flow=False)
    feeds = [x.name for x in result.inputs if x.dtype != tf.resource]
    inputs = dict(zip(sorted(function.structured_input_signature[1]), feeds, strict=True))
    outputs = dict(zip(sorted(function.structured_outputs), [x.name for x in result.outputs], strict=True))
    return Candidate(inputs, outputs, result.graph.as_graph_def(), notes=notes)


def _signature_count(meta) -> int:
    return sum(not key.startswith("__") for key in meta.signature_def)


def _nodes(tensors: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(name.split(":")[0] for name in tensors.values()))


def optimize_for_inference(directory: str, signature: str | None = None) -> Candidate:
    """tensorflow.python.tools.optimize_for_inference_lib over the frozen graph."""
    from tensorflow.python.tools import optimize_for_inference_lib

    before = frozen(directory, signature)
    meta = read_meta_graph(directory)
    dtypes = meta.signature_def[signature or pick_signature(meta.signature_def)].inputs
    kinds = {tensor.split(":")[0]: dtypes[key].dtype for key, tensor in before.inputs.items()}
    feeds = _nodes(before.inputs)
    graph = optimize_for_inference_lib.optimize_for_inference(
        copy.deepcopy(before.graph), feeds, _nodes(before.outputs), [kinds[x] for x in feeds]
    )
    return Candidate(before.inputs, before.outputs, graph, notes=before.notes)


def graph_transform(directory: str, signature: str | None = None) -> Candidate:
    """The Graph Transform Tool of TF 1, still in the wheel under a private name, over the frozen graph."""
    from tensorflow.python.util import _pywrap_transform_graph

    before = frozen(directory, signature)
    after = _pywrap_transform_graph.TransformGraphWithStringInputs(
        before.graph.SerializeToString(),
        ",".join(_nodes(before.inputs)).encode(),
        ",".join(_nodes(before.outputs)).encode(),
        GRAPH_TRANSFORMS.encode(),
    )
    return Candidate(before.inputs, before.outputs, graph_pb2.GraphDef.FromString(after), notes=before.notes)


def grappler(directory: str, signature: str | None = None) -> Candidate:
    """Grappler in process: constant folding and arithmetic rewrites over the frozen graph."""
    from tensorflow.python.grappler import tf_optimizer

    before = frozen(directory, signature)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(before.graph, name="")
        meta = v1.train.export_meta_graph(graph_def=graph.as_graph_def(), graph=graph)
    fetches = meta.collection_def["train_op"].node_list.value
    fetches.extend([*before.inputs.values(), *before.outputs.values()])
    config = config_pb2.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.optimizers.extend(GRAPPLER_OPTIMIZERS)
    rewrites.min_graph_nodes = -1
    return Candidate(before.inputs, before.outputs, tf_optimizer.OptimizeGraph(config, meta), notes=before.notes)


def tfopt_optimized(saved_model_dir: str, out_dir: str):
    """Runs tfopt's lossless recipe; returns (the serving directory that it wrote, its report)."""
    from tfopt.optimize import Options, optimize

    result = optimize(saved_model_dir, out_dir, Options(tflite=(), measure_latency=False, overwrite=True))
    return str(result.directory / "serving" / "1"), result.report


def tfopt(directory: str, out_dir: str, signature: str | None = None) -> Candidate:
    """tfopt's lossless recipe, as it is emitted for serving."""
    serving_dir, report = tfopt_optimized(directory, out_dir)
    candidate = serving(serving_dir, signature)
    for step in report.steps:
        if step.status == "undone":
            candidate.notes.append(f"{step.name} was undone: {step.notes[-1]}")
        for refusal in step.refused:
            candidate.refusals.setdefault(refusal.node, []).append(f"{refusal.rule}: {refusal.reason}")
    return candidate


def build(tool: str, directory: str, scratch: str, signature: str | None = None) -> Candidate:
    """Returns what `tool` (a key of PEERS, "original" or "tfopt") makes of a SavedModel; may write to `scratch`."""
    if tool == "original":
        return serving(directory, signature)
    if tool == "tfopt":
        return tfopt(directory, scratch, signature)
    return PEERS[tool](directory, signature)


PEERS: Mapping[str, Callable[..., Candidate]] = {
    "frozen": frozen,
    "optimize_for_inference": optimize_for_inference,
    "graph_transform": graph_transform,
    "grappler": grappler,
}


def missing_functions(graph: graph_pb2.GraphDef) -> set[str]:
    """Returns the functions that nodes call and the graph's library lacks."""
    known = {function.signature.name for function in graph.library.function}
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    called = {
        name
        for body in bodies
        for node in body
        for value in node.attr.values()
        for name in [value.func.name, *(x.name for x in value.list.func)]
        if name
    }
    return called - known


class Program:
    """A candidate in a v1 session, which is how TensorFlow Serving runs a model."""

    def __init__(self, candidate: Candidate, threads: int | None = None):
        config = config_pb2.ConfigProto()
        if threads:
            config.intra_op_parallelism_threads = threads
            config.inter_op_parallelism_threads = threads
        self.candidate = candidate
        self.session = v1.Session(graph=tf.Graph(), config=config)
        with self.session.graph.as_default():
            if candidate.directory is None:
                tf.import_graph_def(candidate.graph, name="")
            else:
                v1.saved_model.load(self.session, ["serve"], candidate.directory)
        tensors = [self.session.graph.get_tensor_by_name(x) for x in candidate.inputs.values()]
        self.call = self.session.make_callable(list(candidate.outputs.values()), tensors)

    def run(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns output name -> value for one batch, input name -> value."""
        results = self.call(*[batch[key] for key in self.candidate.inputs])
        return dict(zip(self.candidate.outputs, results, strict=True))

    def close(self) -> None:
        """Releases the session."""
        self.session.close()


def relative_error(wanted: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference relative to the output's largest value, over all outputs; inf if not equal
    where values are no numbers, or if shapes differ."""
    worst = 0.0
    for key, left in wanted.items():
        left, right = np.asarray(left), np.asarray(received[key])
        if left.shape != right.shape:
            return float("inf")
        if left.dtype.kind in "OSU":
            worst = max(worst, 0.0 if (left == right).all() else float("inf"))
        elif left.size:
            left, right = left.astype(np.float64), right.astype(np.float64)
            error = float(np.max(np.abs(left - right)) / (np.max(np.abs(left)) or 1.0))
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
