from __future__ import annotations

import pytest
import tensorflow as tf

from tfopt import hazards
from tfopt.model import read_meta_graph


class Hostile(tf.Module):
    """Reads and writes files, runs Python, and reads a table from its own asset."""

    def __init__(self, vocabulary, secret):
        super().__init__()
        self.secret = secret
        initializer = tf.lookup.TextFileInitializer(
            str(vocabulary),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self.table = tf.lookup.StaticHashTable(initializer, -1)
        self.weight = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="word")])
    def leak(self, word):
        return {"id": self.table.lookup(word), "secret": tf.io.read_file(self.secret)}

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, name="path")])
    def anywhere(self, path):
        return {"content": tf.io.read_file(path)}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
    def python(self, x):
        (y,) = tf.numpy_function(lambda value: [value], [x], [tf.float32])
        return {"y": tf.reshape(y, tf.shape(x)) * self.weight}

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, name="text")])
    def dormant(self, text):
        tf.io.write_file("/tmp/stolen.txt", text)
        tf.print(text, output_stream="file:///tmp/log.txt")
        return text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "vocabulary.txt").write_text("a\nb\n")
    (folder / "secret.txt").write_text("password")
    module = Hostile(folder / "vocabulary.txt", str(folder / "secret.txt"))
    signatures = {name: getattr(module, name) for name in ("leak", "anywhere", "python")}
    tf.saved_model.save(module, str(folder / "model"), signatures)
    return folder / "model"


def test_hazards_are_named_with_what_runs_them(hostile):
    found = {(h.op, h.used_by): h for h in hazards.scan(read_meta_graph(hostile)) if not h.routine}
    leak = found["ReadFile", ("leak",)]
    assert leak.kind == hazards.READS and "secret.txt" in leak.detail and leak.function
    assert "from outside" in found["ReadFile", ("anywhere",)].detail
    assert found["PyFunc", ("python",)].kind == hazards.PYTHON
    assert found["WriteFile", ()].kind == hazards.WRITES and "stolen.txt" in found["WriteFile", ()].detail
    assert "log.txt" in found["PrintV2", ()].detail
    assert not any(op.startswith("InitializeTable") and used for op, used in found), "its own asset is no hazard"


def test_the_checkpoint_of_the_model_is_routine(hostile):
    routine = {h.op for h in hazards.scan(read_meta_graph(hostile)) if h.routine}
    assert routine == {"SaveV2", "MergeV2Checkpoints", "RestoreV2"}


def test_the_worst_comes_first(hostile):
    kinds = [h.kind for h in hazards.scan(read_meta_graph(hostile))]
    assert kinds[0] == hazards.PYTHON and kinds == sorted(
        kinds, key=[hazards.PYTHON, hazards.CODE, hazards.NETWORK, hazards.WRITES, hazards.READS].index
    )


def test_a_table_from_a_file_outside_of_the_assets():
    with tf.Graph().as_default() as graph:
        table = tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)
        init = tf.raw_ops.InitializeTableFromTextFileV2(
            table_handle=table, filename="/etc/passwd", key_index=-2, value_index=-1
        )
        word = tf.compat.v1.placeholder(tf.string, (None,), name="word")
        with tf.control_dependencies([init]):
            found = tf.raw_ops.LookupTableFindV2(table_handle=table, keys=word, default_value=tf.constant(0, tf.int64))
    meta = tf.compat.v1.MetaGraphDef()
    meta.graph_def.CopyFrom(graph.as_graph_def())
    meta.signature_def["lookup"].inputs["word"].name = word.name
    meta.signature_def["lookup"].outputs["id"].name = found.name
    (hazard,) = hazards.scan(meta)
    assert hazard.kind == hazards.READS and hazard.detail == "'/etc/passwd'" and hazard.used_by == ("lookup",)


@pytest.mark.parametrize(
    "op, kind",
    [
        ("EagerPyFunc", hazards.PYTHON),
        ("RpcClient", hazards.NETWORK),
        ("DataServiceDatasetV4", hazards.NETWORK),
        ("ExperimentalLMDBDataset", hazards.READS),
        ("SaveDatasetV2", hazards.WRITES),
        ("XlaCustomCallV2", hazards.CODE),
        ("OpOfNobody", hazards.MISSING),
    ],
)
def test_ops_by_name(op, kind):
    meta = tf.compat.v1.MetaGraphDef()
    meta.graph_def.node.add(name="node", op=op)
    (hazard,) = hazards.scan(meta)
    assert (hazard.kind, hazard.node, hazard.used_by) == (kind, "node", ())
