"""What is in a model, what tfopt would gain on it, and what to beware of. The model is read, never executed.

The passes of the lossless recipe are tried on a copy, so that "what would fold" is what does fold. They compute
constants; where the graph reads files, even that is left out.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef, SignatureDef, TensorInfo

from tfopt import hazards, keras_file, recipe, sources
from tfopt.errors import TfoptError
from tfopt.feature_spec import feature_spec
from tfopt.graph import Graph
from tfopt.hazards import Hazard
from tfopt.inline import INIT_SIGNATURE, TRAIN_SIGNATURE
from tfopt.model import Model, origin, read_meta_graph
from tfopt.model import load as load_model
from tfopt.opportunities import bodies, opportunities, probable_bugs
from tfopt.optimize import run_pass
from tfopt.report import Step
from tfopt.rules.affine import BATCH_NORMS


@dataclasses.dataclass
class Tensor:
    """An input, an output, a weight or a state variable.

    `shape` is None for an unknown rank, and has None for an unknown dimension.
    """

    name: str
    dtype: str
    shape: list[int | None] | None
    bytes: int | None = None


@dataclasses.dataclass
class Signature:
    """A signature as it was saved."""

    name: str
    method: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclasses.dataclass
class Feature:
    """A feature of tf.Example that a signature parses; `length` is fixed, variable, sequence or ragged."""

    name: str
    dtype: str
    length: str
    shape: list[int] | None
    default: Any


@dataclasses.dataclass
class Inspection:
    """What is known of a model.

    Attributes:
      path: what was given.
      origin: what wrote it, in words.
      tags: of the MetaGraph.
      files: bytes of every file, by its path in the SavedModel.
      signatures: in order of their names.
      nodes: (in the main graph, in functions, functions).
      ops: op -> count in what the signatures run: calls inlined, branches and loop bodies included. Where the model
        cannot be loaded, in the whole file.
      weights: what the signatures read, the largest first.
      examples: signature -> features that it parses from serialized tf.Examples.
      state: variables that a signature assigns.
      tables: one line each.
      assets: file names.
      batch_norms: how many there are, fused or spelt out, after duplicates are merged.
      steps: what each lossless pass would do.
      opportunities: what tfopt would gain, in sentences.
      bugs: what is probably wrong with the model, in sentences.
      hazards: nodes that do more than compute.
      layers: Keras files only: (layer, why it could run code of the file's author).
      problem: why tfopt cannot optimize it, or None.
    """

    path: str
    origin: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    signatures: list[Signature] = dataclasses.field(default_factory=list)
    nodes: tuple[int, int, int] = (0, 0, 0)
    ops: dict[str, int] = dataclasses.field(default_factory=dict)
    weights: list[Tensor] = dataclasses.field(default_factory=list)
    examples: dict[str, list[Feature]] = dataclasses.field(default_factory=dict)
    state: list[Tensor] = dataclasses.field(default_factory=list)
    tables: list[str] = dataclasses.field(default_factory=list)
    assets: list[str] = dataclasses.field(default_factory=list)
    batch_norms: int = 0
    steps: list[Step] = dataclasses.field(default_factory=list)
    opportunities: list[str] = dataclasses.field(default_factory=list)
    bugs: list[str] = dataclasses.field(default_factory=list)
    hazards: list[Hazard] = dataclasses.field(default_factory=list)
    layers: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    problem: str | None = None

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def inspect(
    path: str | Path,
    signatures: Sequence[str] | None = None,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Inspection:
    """Inspects a model.

    Args:
      path: a SavedModel directory, a Keras file or a frozen GraphDef (see `tfopt.sources`). Of a Keras file that could
        run code, the configuration alone is read.
      signatures: to look at; None for all.
      inputs, outputs: of a frozen GraphDef.

    Raises:
      TfoptError: there is no such model, or it is damaged.
    """
    path = Path(path)
    found = Inspection(str(path))
    if path.suffix.lower() == ".tflite" and path.is_file():
        raise TfoptError(f"{path} is a TFLite file: tfopt-compare measures it; tfopt-inspect reads what it came from")
    if path.suffix.lower() in sources.KERAS_SUFFIXES and path.is_file():
        config = keras_file.read_config(path)
        found.layers = list({layer: (layer, why) for layer, why in keras_file.unsafe(config)}.values())
        if found.layers:
            _describe_layers(found, config, path)
            return found
    with tempfile.TemporaryDirectory(prefix="tfopt-inspect-") as workdir:
        source = sources.as_saved_model(path, inputs=inputs, outputs=outputs, workdir=workdir)
        meta = read_meta_graph(source)
        _describe_file(found, meta, source, path)
        try:
            model = load_model(source, list(signatures) if signatures else None)
        except TfoptError as error:
            if signatures and not set(signatures) <= {s.name for s in found.signatures}:
                raise
            found.problem = str(error)
            found.bugs = probable_bugs(meta, None, ())
            return found
        found.signatures = [s for s in found.signatures if s.name in model.signatures]
        _describe_model(found, model)
        optimized = _try_passes(found, model)
        found.opportunities = opportunities(source, meta, model, optimized, found.steps)
        found.bugs = probable_bugs(meta, optimized, found.steps)
    return found


def _describe_layers(found: Inspection, config: dict[str, Any], path: Path) -> None:
    found.origin = "Keras file"
    found.files = {path.name: path.stat().st_size}
    layers = config.get("config", {}).get("layers", []) if isinstance(config.get("config"), dict) else []
    found.ops = _sorted(
        collections.Counter(str(layer.get("class_name")) for layer in layers if isinstance(layer, dict))
    )
    found.problem = "it holds code, so it was not loaded; tfopt-optimize would need --allow_unsafe_deserialization"


def _describe_file(found: Inspection, meta: MetaGraphDef, source: Path, path: Path) -> None:
    found.origin = origin(meta) if source == path else f"{path.suffix} file, converted to a {origin(meta)}"
    found.tags = list(meta.meta_info_def.tags)
    root = path if source == path else path.parent
    files = sorted(source.rglob("*")) if source == path else [path]
    found.files = {str(f.relative_to(root)): f.stat().st_size for f in files if f.is_file()}
    library = meta.graph_def.library.function
    in_functions = [node for function in library for node in function.node_def]
    found.nodes = (len(meta.graph_def.node), len(in_functions), len(library))
    found.ops = _sorted(collections.Counter(node.op for node in [*meta.graph_def.node, *in_functions]))
    found.signatures = [
        _signature(name, signature)
        for name, signature in sorted(meta.signature_def.items())
        if name not in (INIT_SIGNATURE, TRAIN_SIGNATURE)
    ]
    found.assets = [asset.filename for asset in meta.asset_file_def]
    found.hazards = hazards.scan(meta)


def _describe_model(found: Inspection, model: Model) -> None:
    nodes = [*model.graph.nodes.values(), *(node for f in model.library() for node in f.node_def)]
    found.ops = _sorted(collections.Counter(node.op for node in nodes if node.name not in model.weights))
    weights = [_array(name, value) for name, value in model.weights.items()]
    found.weights = sorted(weights, key=lambda tensor: (-(tensor.bytes or 0), tensor.name))
    found.state = [_array(name, value) for name, value in sorted(model.state.items())]
    for name, signature in model.signatures.items():
        features = {}
        for info in signature.inputs.values():
            if info.name:
                features.update(feature_spec(model.graph, info.name))
        if features:
            found.examples[name] = [_feature(key, feature) for key, feature in sorted(features.items())]
    for name, node in sorted(model.graph.nodes.items()):
        if node.op.removesuffix("V2") in (
            "HashTable",
            "MutableHashTable",
            "MutableDenseHashTable",
            "MutableHashTableOfTensors",
        ):
            key, value = (tf.as_dtype(node.attr[k].type).name for k in ("key_dtype", "value_dtype"))
            size = f", {len(model.tables[name][0]):,} entries" if name in model.tables else ""
            found.tables.append(f"{name}: {node.op}, {key} -> {value}{size}")


def _try_passes(found: Inspection, model: Model) -> Model:
    """Runs the lossless passes on copies; returns the result."""
    reads = any(h.kind == hazards.READS and not h.routine for h in found.hazards)
    for name, options in recipe.read("lossless").steps:
        if reads and name == "fold_constants":
            continue
        if name == "fold_constants" and not found.batch_norms:  # the last moment at which they can be told
            found.batch_norms = sum(_batch_norms(body) for body in bodies(model))
        model, step = run_pass(model, name, options, None)
        found.steps.append(step)
    return model


def _batch_norms(graph: Graph) -> int:
    """Fused ones, and the Rsqrt of a constant with which one that is spelt out begins."""
    spelt_out = [node for node in graph.nodes.values() if node.op == "Rsqrt" and _is_constant(graph, node.name)]
    return len(spelt_out) + sum(node.op in BATCH_NORMS for node in graph.nodes.values())


def _is_constant(graph: Graph, name: str) -> bool:
    leaves = [graph.nodes[n] for n in graph.reachable([name]) if not graph.nodes[n].input]
    return all(leaf.op == "Const" or leaf.name in graph.weights for leaf in leaves)


def _sorted(counts: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _signature(name: str, signature: SignatureDef) -> Signature:
    def tensors(infos: Any) -> list[Tensor]:
        return [_tensor(key, info) for key, info in sorted(infos.items())]

    return Signature(name, signature.method_name, tensors(signature.inputs), tensors(signature.outputs))


def _tensor(name: str, info: TensorInfo) -> Tensor:
    dtype = tf.as_dtype(info.dtype).base_dtype.name if info.dtype else (info.WhichOneof("encoding") or "unknown")
    if info.WhichOneof("encoding") == "coo_sparse":
        dtype += " (sparse)"
    unknown = info.tensor_shape.unknown_rank
    shape: list[int | None] | None = [d.size if d.size >= 0 else None for d in info.tensor_shape.dim]
    return Tensor(name, dtype, None if unknown else shape)


def _array(name: str, value: np.ndarray) -> Tensor:
    return Tensor(name, value.dtype.name if value.dtype.kind not in "OS" else "string", list(value.shape), value.nbytes)


def _feature(name: str, feature: Any) -> Feature:
    kinds = {"FixedLenFeature": "fixed", "VarLenFeature": "variable", "FixedLenSequenceFeature": "sequence"}
    length = kinds.get(type(feature).__name__, "ragged")
    shape = list(feature.shape) if hasattr(feature, "shape") else None
    return Feature(name, tf.as_dtype(feature.dtype).name, length, shape, getattr(feature, "default_value", None))
