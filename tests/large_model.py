"""Writes a SavedModel with one embedding table of any size, in a TF 1 layout, with little memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH = 1024
_SHARD = 1 << 16  # rows


def row(index: int) -> np.ndarray:
    """The row of the table at `index`: float32 (WIDTH,), another one for each index."""
    return _table(index, 1)[0]


def _table(start: int, count: int) -> np.ndarray:
    rows = np.arange(start, start + count, dtype=np.float32)[:, None]
    return rows * np.float32(1e-3) + np.arange(WIDTH, dtype=np.float32)


def main(directory: str | Path, rows: int) -> None:
    """Writes a model that gathers `rows` (doubled) of a table of (rows, WIDTH) by `ids`."""
    import tensorflow as tf
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    v1 = tf.compat.v1
    variables = Path(directory) / "variables"
    variables.mkdir(parents=True)
    with tf.Graph().as_default() as graph:
        ids = v1.placeholder(tf.int64, [None], "ids")
        table = v1.get_variable("table", [rows, WIDTH], use_resource=True)
        y = tf.identity(tf.gather(table, ids)) * 2.0
        saver = v1.train.Saver([table])
        saved = SavedModel(saved_model_schema_version=1)
        saved.meta_graphs.add().CopyFrom(v1.train.export_meta_graph(graph=graph, saver_def=saver.saver_def))
        meta = saved.meta_graphs[0]
        meta.meta_info_def.tags.append("serve")
        signature = v1.saved_model.predict_signature_def({"ids": ids}, {"rows": y})
        meta.signature_def["serving_default"].CopyFrom(signature)
    (Path(directory) / "saved_model.pb").write_bytes(saved.SerializeToString())
    shards = []
    for start in range(0, rows, _SHARD):
        count = min(_SHARD, rows - start)
        shards.append(str(variables / f"shard-{start}"))
        tf.raw_ops.SaveV2(
            prefix=shards[-1],
            tensor_names=["table"],
            shape_and_slices=[f"{rows} {WIDTH} {start},{count}:0,{WIDTH}"],
            tensors=[tf.constant(_table(start, count))],
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=shards, destination_prefix=str(variables / "variables"))
