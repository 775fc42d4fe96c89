"""Writes a Model as a SavedModel that TensorFlow Serving, Python and the TFLite converter load alike.

The MetaGraph is written node by node in the TF 1 layout, which every loader understands: SignatureDefs keep their
names, methods and metadata, and weights are Const nodes or variables restored from a checkpoint written in slices.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.variable_pb2 import VariableDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from tfopt.graph import Graph, const_node, make_node, split
from tfopt.inline import label, set_tensor_name, tensor_names
from tfopt.model import Model

# Weights up to this many bytes in all become constants: TensorFlow folds and caches what it knows to be constant, at
# the price of a larger saved_model.pb, which cannot exceed 2 GiB (docs/serving.md has the measurement).
MAX_CONSTANT_BYTES = 128 << 20

_LARGEST_GRAPH = (2 << 30) - (64 << 20)  # a saved_model.pb, with room for its nodes
_SLICE_BYTES = 256 << 20  # one SaveV2 call holds a copy of everything that it writes
_CONTROL_FLOW = ("If", "While", "Case", "StatelessIf", "StatelessWhile", "StatelessCase")


def save(model: Model, directory: str | Path, *, max_constant_bytes: int = MAX_CONSTANT_BYTES) -> None:
    """Writes `model` into a directory that does not exist yet.

    Args:
      model: the model; left as it is.
      directory: where saved_model.pb, variables/, assets/ and assets.extra/ go. The caller makes it appear atomically.
      max_constant_bytes: the smallest weights become constants until this many bytes, or what one saved_model.pb can
        hold, are reached; the others become variables.

    Raises:
      FileExistsError: the directory exists.
    """
    directory = Path(directory)
    (directory / "variables").mkdir(parents=True)
    constants = _choose_constants(model.weights, min(max_constant_bytes, _LARGEST_GRAPH))
    graph = model.graph.copy()
    state = {name: graph.nodes[name].attr["shared_name"].s.decode() or name for name in model.state}
    variables = _add_variables(
        graph, {n: w for n, w in model.weights.items() if n not in constants}, set(state.values())
    )
    values = {key: model.weights[key] for key in variables.values()}
    for name, value in model.state.items():
        variables[name] = _free(state[name], {*model.weights, *values})
        values[variables[name]] = value
    for name, pair in model.tables.items():
        values |= {f"{name}/keys": pair[0], f"{name}/values": pair[1]}

    saved = SavedModel(saved_model_schema_version=1)
    meta = saved.meta_graphs.add()
    meta.meta_info_def.tags.extend(model.tags or ["serve"])
    meta.meta_info_def.tensorflow_version = tf.version.VERSION
    meta.meta_info_def.tensorflow_git_version = tf.version.GIT_VERSION
    meta.asset_file_def.extend(model.assets)
    if values:
        _add_saver(meta, graph, variables, values, model)
    for name, signature in model.signatures.items():
        target = meta.signature_def[name]
        target.CopyFrom(signature)
        for output, info in target.outputs.items():
            for component, _ in tensor_names(info):
                producer, port = split(model.graph.outputs[label(name, output, component)])
                set_tensor_name(info, component, f"{producer}:{port}")
                if info.dtype > 100:  # a TF 1 reference type; what is emitted is the value
                    info.dtype -= 100
    if model.init:
        meta.collection_def["saved_model_main_op"].node_list.value.append(model.init)
    meta.graph_def.CopyFrom(graph.to_graph_def(model.library()))
    for node in meta.graph_def.node:
        if node.name in constants:  # only now, since every copy of the graph would copy the values too
            node.CopyFrom(const_node(node.name, model.weights[node.name]))
    for holder in (meta.graph_def.node, *(f.node_def for f in meta.graph_def.library.function)):
        for node in holder:
            if node.op in _CONTROL_FLOW:
                node.attr["_lower_using_switch_merge"].b = True
    (directory / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))
    _write_checkpoint(directory / "variables", values)
    if model.assets:
        (directory / "assets").mkdir()
        for asset in model.assets:
            shutil.copyfile(model.directory / "assets" / asset.filename, directory / "assets" / asset.filename)
    if (model.directory / "assets.extra").is_dir():
        shutil.copytree(model.directory / "assets.extra", directory / "assets.extra")


def _choose_constants(weights: dict[str, np.ndarray], budget: int) -> set[str]:
    chosen = set()
    for name, value in sorted(weights.items(), key=lambda item: (item[1].nbytes, item[0])):
        budget -= value.nbytes
        if budget < 0:
            break
        chosen.add(name)
    return chosen


def _add_variables(graph: Graph, weights: dict[str, np.ndarray], taken: set[str]) -> dict[str, str]:
    """Makes each weight a read of a variable; returns handle node name -> checkpoint key.

    Handles of one shared name are one variable: a weight's must not be among the `taken` ones, those of the state.
    """
    for name, value in weights.items():
        dtype = tf.as_dtype(value.dtype)
        shared = _free(name, taken)
        handle = graph.add_op(
            f"{name}/handle", "VarHandleOp", (), dtype=dtype, shape=tuple(value.shape), shared_name=shared
        )
        graph.replace(make_node(name, "ReadVariableOp", [handle], dtype=dtype))
    return {split(graph.nodes[name].input[0])[0]: name for name in weights}


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _add_saver(
    meta: MetaGraphDef, graph: Graph, variables: dict[str, str], values: dict[str, np.ndarray], model: Model
) -> None:
    """Adds save and restore ops, and the collections by which loaders find variables."""
    default = graph.add(const_node(graph.unique_name("save/model"), np.array(b"model")))
    filename = graph.add_op("save/filename", "PlaceholderWithDefault", [default], dtype=tf.string, shape=())
    restores, reads = [], []
    trainable = {name for name, value in model.weights.items() if value.dtype.kind == "f"}
    for handle, key in variables.items():
        dtype = tf.as_dtype(values[key].dtype)
        restored = _add_restore(graph, f"save/restore/{handle}", filename, [key], [dtype])
        assign = graph.add_op(f"save/assign/{handle}", "AssignVariableOp", [handle, restored], dtype=dtype)
        reader = key if key in model.weights else ""
        read = reader or graph.add_op(f"save/read/{handle}", "ReadVariableOp", [handle], dtype=dtype)
        restores.append(assign)
        reads.append((key, read, dtype))
        definition = VariableDef(
            variable_name=f"{handle}:0",
            initial_value_name=f"{restored}:0",
            initializer_name=assign,
            snapshot_name=f"{read}:0",
            is_resource=True,
            trainable=key in trainable,
        )
        for collection in ["variables", *(["trainable_variables"] if key in trainable else [])]:
            meta.collection_def[collection].bytes_list.value.append(definition.SerializeToString())
    for table in model.tables:
        keys = [f"{table}/keys", f"{table}/values"]
        dtypes = [tf.as_dtype(graph.nodes[table].attr[a].type) for a in ("key_dtype", "value_dtype")]
        restored = _add_restore(graph, f"save/restore/{table}", filename, keys, dtypes)
        imported = graph.add_op(
            f"save/import/{table}",
            "LookupTableImportV2",
            [table, restored, f"{restored}:1"],
            Tin=dtypes[0],
            Tout=dtypes[1],
        )
        restores.append(imported)
        exported = graph.add_op(
            f"save/export/{table}", "LookupTableExportV2", [table], Tkeys=dtypes[0], Tvalues=dtypes[1]
        )
        reads += [(keys[0], exported, dtypes[0]), (keys[1], f"{exported}:1", dtypes[1])]
    names = graph.add(const_node(graph.unique_name("save/names"), np.array([r[0].encode() for r in reads], object)))
    slices = graph.add(const_node(graph.unique_name("save/slices"), np.array([b""] * len(reads), object)))
    saver = make_node(graph.unique_name("save/SaveV2"), "SaveV2", [filename, names, slices, *(r[1] for r in reads)])
    saver.attr["dtypes"].list.type.extend(r[2].as_datatype_enum for r in reads)
    done = graph.add_op("save/done", "Identity", [filename, f"^{graph.add(saver)}"], T=tf.string)
    restore = graph.add_op("save/restore_all", "NoOp", [f"^{name}" for name in restores])
    meta.saver_def.filename_tensor_name = f"{filename}:0"
    meta.saver_def.save_tensor_name = f"{done}:0"
    meta.saver_def.restore_op_name = restore
    meta.saver_def.version = 2
    meta.saver_def.max_to_keep = 5


def _add_restore(graph: Graph, name: str, filename: str, keys: list[str], dtypes: list[tf.DType]) -> str:
    names = graph.add(const_node(graph.unique_name(f"{name}/names"), np.array([k.encode() for k in keys], object)))
    slices = graph.add(const_node(graph.unique_name(f"{name}/slices"), np.array([b""] * len(keys), object)))
    node = make_node(graph.unique_name(name), "RestoreV2", [filename, names, slices])
    node.attr["dtypes"].list.type.extend(dtype.as_datatype_enum for dtype in dtypes)
    return graph.add(node)


def _write_checkpoint(directory: Path, values: dict[str, np.ndarray]) -> None:
    """Writes a checkpoint in slices, so that memory stays near one slice above the weights' own."""
    if not values:
        return
    parts: list[list[tuple[str, str, np.ndarray]]] = [[]]
    size = 0
    for key, value in values.items():
        for piece in _pieces(key, value):
            if parts[-1] and size + piece[2].nbytes > _SLICE_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(piece)
            size += piece[2].nbytes
    prefixes = []
    for index, part in enumerate(parts):
        prefixes.append(str(directory / f"part-{index:05d}"))
        tf.raw_ops.SaveV2(
            prefix=prefixes[-1],
            tensor_names=[key for key, _, _ in part],
            shape_and_slices=[where for _, where, _ in part],
            tensors=[tf.convert_to_tensor(array) for _, _, array in part],
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=prefixes, destination_prefix=str(directory / "variables"), delete_old_dirs=False
    )


def _pieces(key: str, value: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (key, where it lies in the whole, rows) of a value; all of it in one piece where it is small."""
    if value.nbytes <= _SLICE_BYTES or not value.ndim or value.dtype == object:
        yield key, "", value
        return
    rows = max(1, _SLICE_BYTES * len(value) // value.nbytes)
    shape = " ".join(map(str, value.shape))
    others = ":-" * (value.ndim - 1)
    for start in range(0, len(value), rows):
        piece = value[start : start + rows]
        yield key, f"{shape} {start},{len(piece)}{others}", piece
