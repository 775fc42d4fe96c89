"""What tfopt would gain on a model, and what is probably wrong with it, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.python.framework import kernels

from tfopt.graph import Graph, function_body, op_def
from tfopt.model import Model
from tfopt.report import Step
from tfopt.report_words import size

_RANDOM = frozenset(
    (
        *("RandomUniform", "StatelessRandomUniform", "RandomStandardNormal", "StatelessRandomNormal"),
        *("TruncatedNormal", "StatelessTruncatedNormal", "RandomUniformInt", "StatelessRandomUniformInt"),
        *("Multinomial", "RandomShuffle"),
    )
)
_DROPOUT = ("GreaterEqual", "Less", "Floor", "Add", "AddV2")  # what dropout does first with its random numbers

# Ops that TFLite runs by the Flex delegate only, by how their names begin.
_SELECT = (
    *("ParseExample", "ParseSingleExample", "Decode", "Image", "Crop"),
    *("Sparse", "Ragged", "Bincount", "DenseBincount", "BoostedTrees", "MutableHashTable", "MutableDenseHashTable"),
    *("String", "Regex", "AsString", "Substr", "Unicode"),
    *("Svd", "Qr", "Cholesky", "MatrixInverse", "MatrixSolve", "FFT", "IFFT", "IRFFT"),
)
_BUILTIN = ("SparseToDense",)  # begins like one of them, and is none

# Ops that the runtime itself carries out.
_NO_KERNEL = frozenset(
    (
        *("If", "StatelessIf", "While", "StatelessWhile", "Case", "StatelessCase"),
        *("PartitionedCall", "StatefulPartitionedCall"),
    )
)

_QUANTIZED = 1024  # weights of fewer elements stay floats


def opportunities(source: Path, meta: MetaGraphDef, model: Model, optimized: Model, steps: Sequence[Step]) -> list[str]:
    """What there is to gain.

    Args:
      source: the SavedModel.
      meta: the model as it was saved.
      model: as it was loaded.
      optimized: what the lossless passes made of it.
      steps: what each of them did.
    """
    found = []
    before, after = model.node_count(), optimized.node_count()
    found.append(
        f"The lossless recipe leaves {after:,} of {model.original_nodes:,} nodes "
        f"({model.original_nodes - before:,} serve other functions, saving or training; "
        f"the passes remove {before - after:,})."
    )
    graph_bytes, kept = meta.ByteSize(), optimized.graph.to_graph_def(optimized.library()).ByteSize()
    if graph_bytes > 2 * kept:
        found.append(f"saved_model.pb shrinks from {size(graph_bytes)} to about {size(kept)}, weights apart.")
    stored = _checkpoint_bytes(source)
    needed = sum(w.nbytes for w in model.weights.values()) + sum(s.nbytes for s in model.state.values())
    if stored > 1.05 * needed + 1000:
        found.append(
            f"The checkpoint holds {size(stored)}, of which signatures read {size(min(needed, stored))}: "
            "the rest is duplicates or training state."
        )
    if model.unused:
        more = ", ..." if len(model.unused) > 4 else ""
        names = [name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE") for name in model.unused]
        found.append(f"Restored, but read by no signature: {len(names)} ({', '.join(names[:4])}{more}).")
    shared = sum(s.weight_bytes_before - s.weight_bytes_after for s in steps if s.name == "merge_duplicates")
    if shared > 1000:
        found.append(f"Equal weights are stored {size(shared)} too often; they are merged.")
    found += _weights(optimized)
    found += _device(meta, optimized)
    return found


def _checkpoint_bytes(source: Path) -> int:
    prefix = source / "variables" / "variables"
    if not prefix.with_suffix(".index").is_file():
        return 0
    reader = tf.train.load_checkpoint(str(prefix))
    dtypes = reader.get_variable_to_dtype_map()
    return sum(
        int(np.prod(shape)) * dtypes[name].size
        for name, shape in reader.get_variable_to_shape_map().items()
        if dtypes[name].size
    )


def _weights(model: Model) -> list[str]:
    found = []
    floats = [w for w in model.weights.values() if w.dtype == np.float32 and w.size >= _QUANTIZED]
    total = sum(w.nbytes for w in floats)
    if total:
        found.append(
            f"{size(total)} of float32 weights would take {size(total // 2)} as float16 and {size(total // 4)} as int8 "
            "(tfopt-optimize --tflite=float16,dynamic_int8)."
        )
        zeros = sum(int(w.size - np.count_nonzero(w)) for w in floats)
        share = zeros * 4 / total
        if share > 0.3:
            found.append(f"{share:.0%} of these weights are zero: the model is pruned, and its files compress well.")
    return found


def select_ops(model: Model) -> list[str]:
    """Ops of a model that TFLite runs as Select TF ops only."""
    return sorted({node.op for node in _nodes(model) if node.op.startswith(_SELECT) and node.op not in _BUILTIN})


def _device(meta: MetaGraphDef, model: Model) -> list[str]:
    found = []
    if ops := select_ops(model):
        more = ", ..." if len(ops) > 6 else ""
        found.append(f"TFLite needs Select TF ops for {', '.join(ops[:6])}{more} (--allow_select_tf_ops).")
    for name in model.signatures:
        for key, info in sorted(meta.signature_def[name].inputs.items()):
            dims = [d.size for d in info.tensor_shape.dim]
            if info.tensor_shape.unknown_rank:
                found.append(f"Signature {name!r}: input {key!r} has no rank; a fixed one lets runtimes plan memory.")
            elif any(d < 0 for d in dims[1:]):
                shape = ", ".join("?" if d < 0 else str(d) for d in dims)
                found.append(
                    f"Signature {name!r}: input {key!r} is dynamic beyond the batch ({shape}); where sizes are fixed "
                    "in practice, exporting them so lets runtimes plan memory and fuse more."
                )
    return found


def probable_bugs(meta: MetaGraphDef, model: Model | None, steps: Sequence[Step]) -> list[str]:
    """What is probably wrong.

    Args:
      meta: the model as it was saved.
      model: after the lossless passes; None where it could not be loaded.
      steps: what the passes did.
    """
    found = []
    for step in steps:
        for note in step.notes:
            if note.startswith("probable bug: "):
                text = note.removeprefix("probable bug: ")
                found.append(text[:1].upper() + text[1:] + ": each answer depends on the other rows of its batch.")
    if model is None:
        return found
    for body in bodies(model):
        for name, node in body.nodes.items():
            if node.op.removesuffix("V2") in _RANDOM:
                drops = any(body.nodes[user].op in _DROPOUT for user in body.users(name))
                what = "Dropout is active at serving time" if drops else "Random numbers are drawn at serving time"
                found.append(f"{what}: {node.op} {name!r}; the same input gives other answers at each call.")
    for op in sorted({node.op for node in _nodes(model)}):
        if op_def(op) is not None and not kernels.get_registered_kernels_for_op(op).kernel and op not in _NO_KERNEL:
            names = [node.name for node in _nodes(model) if node.op == op]
            found.append(
                f"TensorFlow {tf.__version__} has no kernel for {op} ({names[0]!r}{', ...' * (len(names) > 1)}): "
                "the model loads, and fails when it is called."
            )
    for name, weight in model.weights.items():
        if weight.dtype.kind == "f" and not np.isfinite(weight).all():
            found.append(f"Weight {name!r} holds NaN or infinity.")
    return list(dict.fromkeys(found))


def _nodes(model: Model) -> list[NodeDef]:
    return [
        *model.graph.nodes.values(),
        *(node for f in model.library() for node in f.node_def if node.op not in model.functions),
    ]


def bodies(model: Model) -> list[Graph]:
    """The main body, and those of the branches and loops that it needs."""
    found = [model.graph]
    for function in model.library():
        try:
            found.append(function_body(function, model.functions))
        except ValueError:
            continue  # polymorphic: nothing that is called this way draws numbers
    return found
