"""A trained model as a pure function of (weights, inputs): loading a SavedModel splits the two."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.protobuf.meta_graph_pb2 import AssetFileDef, MetaGraphDef, SignatureDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from tfopt.errors import TfoptError, one_line
from tfopt.graph import WEIGHT_ELEMENTS, Graph, called_functions, const_node, make_node, op_def, split
from tfopt.inline import INIT_SIGNATURE, TRAIN_SIGNATURE, inline, tensor_names
from tfopt.variables import (
    CheckpointKey,
    bypass_handle_identities,
    demote,
    object_graph_keys,
    read_checkpoint,
    read_only,
    restored_keys,
)


@dataclasses.dataclass
class Model:
    """A loaded model.

    Attributes:
      graph: one body for all signatures. Weights are Placeholders, whose values are in `graph.weights`; results are
        labelled `signature:output`.
      functions: name -> FunctionDef of what is not inlined: branches and loop bodies.
      signatures: name -> SignatureDef. Input tensor names are true at all times, output tensor names only after saving:
        until then `graph.outputs` holds them.
      state: name of a VarHandleOp -> its restored value. What a signature assigns is here.
      tables: name of a mutable table's node -> its restored (keys, values).
      init: the node that initialises static tables, or None.
      assets: files that tensors of the graph name.
      directory: the SavedModel that this came from; assets are copied from there.
      tags: the tags of the MetaGraph.
      original_nodes: nodes in the SavedModel as it was, functions included.
      origin: what wrote the SavedModel, in words.
      unused: checkpoint names of what serving does not need: optimizer slots, metrics, counters.
      requests: signature whose inputs a pass has changed -> the steps by which a client makes them from rows of the
        original one (see `tfopt.serving.encode`).
      stands_for: signature that a pass has added -> the one of the original that it computes.
    """

    graph: Graph
    functions: dict[str, FunctionDef]
    signatures: dict[str, SignatureDef]
    state: dict[str, np.ndarray]
    tables: dict[str, tuple[np.ndarray, np.ndarray]]
    init: str | None
    assets: list[AssetFileDef]
    directory: Path
    tags: list[str]
    original_nodes: int
    origin: str
    unused: list[str]
    requests: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    stands_for: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Placeholder name -> value of every weight."""
        return self.graph.weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and of the constants that stayed in the graph."""
        constants = sum(n.attr["value"].tensor.ByteSize() for n in self.graph.nodes.values() if n.op == "Const")
        return constants + sum(weight.nbytes for weight in self.weights.values())

    def node_count(self) -> int:
        """Nodes of the main body and of every function that is still called; weights count as one node each."""
        return len(self.graph.nodes) + sum(len(self.functions[name].node_def) for name in self.called())

    def called(self) -> list[str]:
        """Names of the functions that the graph needs, callees after callers, without repetition."""
        names: dict[str, None] = {}
        stack = [name for node in self.graph.nodes.values() for name in called_functions(node)]
        stack += [node.op for node in self.graph.nodes.values() if node.op in self.functions]
        while stack:
            name = stack.pop()
            if name in names:
                continue
            if name not in self.functions:
                raise TfoptError(f"the graph calls function {name!r}, which its library does not have")
            names[name] = None
            for node in self.functions[name].node_def:
                stack.extend(called_functions(node))
                if node.op in self.functions:
                    stack.append(node.op)
        return list(names)

    def library(self) -> list[FunctionDef]:
        """The functions that the graph needs."""
        return [self.functions[name] for name in self.called()]

    def check(self) -> None:
        """Raises ValueError where the graph is not well-formed: a cycle, or a reference to nothing."""
        graph = self.graph
        for node in graph.nodes.values():
            for ref in node.input:
                if split(ref)[0] not in graph.nodes:
                    raise ValueError(f"node {node.name!r} refers to {ref!r}, which does not exist")
        for name in [*graph.roots(), *graph.weights]:
            if name not in graph.nodes:
                raise ValueError(f"node {name!r} is gone")
        graph.topological()
        self.called()

    def hoist_constants(self) -> None:
        """Moves large numeric constants from the graph to the weights, in place."""
        for node in list(self.graph.nodes.values()):
            if node.op != "Const" or any(ref.startswith("^") for ref in node.input):
                continue
            size = math.prod(d.size for d in node.attr["value"].tensor.tensor_shape.dim)
            dtype = tf.as_dtype(node.attr["dtype"].type)
            if size >= WEIGHT_ELEMENTS and (dtype.is_floating or dtype.is_integer or dtype.is_bool):
                value = self.graph.constant(node.name)
                assert value is not None
                self.graph.set_constant(node.name, value)

    def copy(self) -> Model:
        """A copy that can be rewritten without touching this one; arrays are shared."""
        signatures = {}
        for name, signature in self.signatures.items():
            signatures[name] = SignatureDef()
            signatures[name].CopyFrom(signature)
        return dataclasses.replace(
            self,
            graph=self.graph.copy(),
            functions=dict(self.functions),
            signatures=signatures,
            state=dict(self.state),
            tables=dict(self.tables),
            requests={name: list(steps) for name, steps in self.requests.items()},
            stands_for=dict(self.stands_for),
        )


def load(path: str | Path, signatures: list[str] | None = None) -> Model:
    """Loads a SavedModel of any origin (TF 1, Estimator, TF 2, Keras 2 and 3).

    Args:
      path: the directory that holds saved_model.pb.
      signatures: names of the signatures to keep; None keeps all.

    Returns:
      The model, inlined, with weights apart from the graph.

    Raises:
      TfoptError: not a SavedModel, damaged, an op that is not registered, or an unknown signature; one line each.
    """
    directory = Path(path)
    meta = read_meta_graph(directory)
    total = len(meta.graph_def.node) + sum(len(f.node_def) for f in meta.graph_def.library.function)
    kept = _choose_signatures(meta, signatures, directory)
    prefix = str(directory / "variables" / "variables")
    assets = list(meta.asset_file_def)
    try:
        captured = object_graph_keys(meta, prefix)
    except (tf.errors.OpError, ValueError, KeyError, IndexError, DecodeError, RuntimeError) as error:
        raise TfoptError(f"{prefix}: the checkpoint's object graph cannot be read: {one_line(error)}") from error
    try:
        inlined = inline(meta, kept)
    except TfoptError as error:
        raise TfoptError(f"{directory / 'saved_model.pb'}: {error}") from error
    except (tf.errors.OpError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise TfoptError(f"{directory / 'saved_model.pb'}: the graph is damaged: {one_line(error)}") from error

    for asset in assets:
        if Path(asset.filename).is_absolute() or ".." in Path(asset.filename).parts:
            raise TfoptError(f"{directory}: asset {asset.filename!r} lies outside the SavedModel; refused")
    asset_nodes = [split(asset.tensor_info.name)[0] for asset in assets]
    keep = [name for name in (inlined.init, inlined.restore) if name]
    inputs = [split(t)[0] for s in kept.values() for _, i in sorted(s.inputs.items()) for _, t in tensor_names(i)]
    graph = Graph(inlined.graph_def.node, inlined.outputs, keep=keep, arguments=dict.fromkeys(inputs))
    functions = {f.signature.name: f for f in inlined.graph_def.library.function}

    bypass_handle_identities(graph)
    keys, table_keys = restored_keys(graph, inlined.restore) if inlined.restore else ({}, {})
    keys.update(captured)
    in_checkpoint = {key.name for key in keys.values()}
    graph.keep = [inlined.init] if inlined.init else []
    live_assets = [name for name in asset_nodes if name in graph.reachable(graph.roots())]
    graph.keep += live_assets
    graph.sweep()
    for node in graph.nodes.values():
        definition = op_def(node.op)
        if definition is not None and any(arg.is_ref for arg in definition.input_arg):
            raise TfoptError(f"node {node.name!r}: {node.op} on a TF 1 reference variable is not supported")
    handles = {n.name: n for n in graph.nodes.values() if n.op == "VarHandleOp" and n.name in keys}
    tables = {name: pair for name, pair in table_keys.items() if name in graph.nodes}

    wanted = [keys[name] for name in handles] + [key for pair in tables.values() for key in pair]
    values = read_checkpoint(prefix, wanted)
    used = {key.name for key in wanted}
    model = Model(
        graph=graph,
        functions=functions,
        signatures=kept,
        state={},
        tables={},
        init=inlined.init,
        assets=[a for a, name in zip(assets, asset_nodes, strict=True) if name in live_assets],
        directory=directory,
        tags=list(meta.meta_info_def.tags),
        original_nodes=total,
        origin=origin(meta),
        unused=sorted(in_checkpoint - used),
    )
    for name, index in zip(tables, range(len(handles), len(values), 2), strict=True):
        model.tables[name] = (values[index], values[index + 1])
    _split_weights(model, dict(zip(handles, values, strict=False)), keys)
    model.hoist_constants()
    graph.sweep()
    model.functions = {name: functions[name] for name in model.called()}
    return model


def read_meta_graph(directory: Path) -> MetaGraphDef:
    """Reads the graph that serves, as it was saved; its assets are in `asset_file_def`, also where it is of TF 1.

    Raises:
      TfoptError: not a SavedModel, or damaged.
    """
    file = directory / "saved_model.pb"
    if not directory.exists():
        raise TfoptError(f"{directory}: no such file or directory")
    if not file.is_file():
        versions = (
            sorted(p.name for p in directory.iterdir() if (p / "saved_model.pb").is_file())
            if directory.is_dir()
            else []
        )
        hint = f"; did you mean {directory / versions[-1]}?" if versions else ""
        raise TfoptError(f"{directory}: not a SavedModel: it holds no saved_model.pb{hint}")
    try:
        saved = SavedModel.FromString(file.read_bytes())
    except (DecodeError, OSError, UnicodeDecodeError) as error:
        raise TfoptError(f"{file}: cannot be read as a SavedModel: {one_line(error)}") from error
    serving = [meta for meta in saved.meta_graphs if "serve" in meta.meta_info_def.tags]
    candidates = serving or list(saved.meta_graphs)
    if not candidates:
        raise TfoptError(f"{file}: holds no MetaGraph; it is empty or damaged")
    meta = min(candidates, key=lambda meta: len(meta.meta_info_def.tags))
    if not meta.asset_file_def and "saved_model_assets" in meta.collection_def:
        for packed in meta.collection_def["saved_model_assets"].any_list.value:
            packed.Unpack(meta.asset_file_def.add())
    return meta


def origin(meta: MetaGraphDef) -> str:
    """What wrote a SavedModel, in words."""
    version = meta.meta_info_def.tensorflow_version or "unknown version"
    kind = "TF 2 SavedModel" if meta.HasField("object_graph_def") else "TF 1 SavedModel"
    return f"{kind} written by TensorFlow {version}"


def _choose_signatures(meta: MetaGraphDef, wanted: list[str] | None, directory: Path) -> dict[str, SignatureDef]:
    known = {
        name: signature
        for name, signature in sorted(meta.signature_def.items())
        if name not in (INIT_SIGNATURE, TRAIN_SIGNATURE) and signature.outputs
    }
    if not known:
        raise TfoptError(
            f"{directory}: has no serving signature; export it with one (for instance `model.export(...)`)"
        )
    for name in wanted or ():
        if name not in known:
            raise TfoptError(f"{directory}: has no signature {name!r}; it has {', '.join(map(repr, known))}")
    chosen = {}
    for name in wanted or known:
        chosen[name] = SignatureDef()
        chosen[name].CopyFrom(known[name])
    return chosen


def _split_weights(model: Model, values: dict[str, np.ndarray], keys: dict[str, CheckpointKey]) -> None:
    """Makes weights of the restored variables that are only read (constants of strings), and state of the others."""
    graph = model.graph
    weights = [name for name in values if read_only(graph, name, model.functions)]
    for name in weights:
        if keys[name].dtype == tf.string:
            graph.replace(const_node(name, values[name]))
            continue
        graph.replace(make_node(name, "Placeholder", dtype=keys[name].dtype, shape=tuple(values[name].shape)))
        graph.weights[name] = values[name]
    demote(graph, {name: keys[name].dtype for name in weights}, model.functions)
    model.state = {name: value for name, value in values.items() if name not in weights}
