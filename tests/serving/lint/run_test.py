"""Every rule of the linter: a model that has what it looks for, and one that has not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_tf1, spec
from tfopt.errors import TfoptError
from tfopt.serving import warmup
from tfopt.serving.lint import probe as lint_probe
from tfopt.serving.lint import run as lint
from tfopt.serving.lint import subject as lint_subject
from tfopt.serving.lint.run import Flags
from tfopt.serving.lint.subject import Probe, Trial

v1 = tf.compat.v1


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, request):
    """Models are run here: a process of its own for each would spend seconds on the import of TensorFlow."""
    if "own_process" not in request.node.name:
        run = property(lambda self: lint_probe.probe(self.directory, self.flags.data) if self.run else Probe())
        monkeypatch.setattr(lint_subject.Subject, "probe", run)


BATCHING = Flags(enable_batching=True)


def saved(path, **functions):
    """A module with these functions as signatures."""
    module = tf.Module()
    tf.saved_model.save(module, str(path), signatures=functions)
    return path


def function(call, *specs, **options):
    return tf.function(call, input_signature=specs, **options)


@pytest.fixture(scope="module")
def plain(built):
    """Two signatures, float32 (?, 4), two weights: nothing is wrong with it."""
    return built("shared_weights")


@pytest.fixture
def copied(plain, tmp_path):
    """A base path with the same model as version 1."""
    shutil.copytree(plain, tmp_path / "m" / "1", copy_function=shutil.copyfile)
    return tmp_path / "m"


def found(path, flags=None, run=False):
    """rule -> [(severity, where)]"""
    result = {}
    for finding in lint.lint(path, flags, run=run).findings:
        assert finding.severity in lint_subject.SEVERITIES and finding.reason and finding.todo
        result.setdefault(finding.rule, []).append((finding.severity, finding.where))
    return result


def test_nothing_is_wrong_with_a_good_model(copied):
    warmup.write(copied / "1", [1, 4])
    given = copied / "batching_params.pbtxt"
    given.write_text("max_batch_size { value: 4 } allowed_batch_sizes: [1, 4]")
    flags = Flags(enable_batching=True, batching_parameters_file=str(given), memory_bytes=10 << 30)
    assert found(copied, flags, run=True) == {"no-default-signature": [("info", "signatures")]}


# -- files


def test_tags(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], "x")
        save_tf1(tmp_path / "gpu", session, {"serving_default": ({"x": x}, {"y": x + 1.0})}, tags=("serve", "gpu"))
        save_tf1(tmp_path / "train", session, {"serving_default": ({"x": x}, {"y": x + 1.0})}, tags=("train",))
        save_tf1(tmp_path / "1", session, {"serving_default": ({"x": x}, {"y": x + 1.0})})
    assert found(tmp_path / "gpu")["serve-tag"][0][0] == found(tmp_path / "train")["serve-tag"][0][0] == "error"
    assert "serve-tag" not in found(tmp_path / "1")


def test_version_names(copied, plain):
    assert "version-name" not in found(copied) and "version-name" not in found(copied / "1")
    assert found(plain)["version-name"] == [("info", plain.name)]
    shutil.copytree(copied / "1", copied / "new")
    shutil.copytree(copied / "1", copied / "001")
    assert found(copied)["version-name"] == [("warning", "new"), ("warning", "1")]


@pytest.mark.parametrize("gone", ["variables.index", "variables.data-00000-of-00001"])
def test_missing_variables(copied, gone):
    assert "files-missing" not in found(copied)
    (copied / "1" / "variables" / gone).unlink()
    ((severity, where),) = found(copied)["files-missing"]
    assert severity == "error" and where.startswith("variables/")


def test_missing_assets(built, tmp_path):
    model = tmp_path / "1"
    shutil.copytree(built("static_tables"), model, copy_function=shutil.copyfile)
    assert "files-missing" not in found(model)
    (asset,) = (model / "assets").iterdir()
    asset.unlink()
    assert found(model)["files-missing"] == [("error", f"assets/{asset.name}")]
    again = found(model, run=True)
    assert again["files-missing"][0][0] == "error" and "does-not-load" in again


def test_size_of_the_graph(copied, monkeypatch):
    from tfopt.serving.lint import files as lint_files

    assert "graph-size" not in found(copied)
    monkeypatch.setattr(lint_files, "_LARGE_GRAPH", 100)
    assert found(copied)["graph-size"] == [("warning", "saved_model.pb")]
    monkeypatch.setattr(lint_files, "_LIMIT", 100)
    assert found(copied)["graph-size"] == [("error", "saved_model.pb")]


@pytest.mark.parametrize(("given", "severity"), [(1 << 20, "error"), (1 << 30, "warning"), (8 << 30, None)])
def test_memory(copied, given, severity):
    assert [s for s, _ in found(copied, Flags(memory_bytes=given)).get("memory", [])] == (
        [severity] if severity else []
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('model_config_list { config { name: "a" base_path: "/a" model_platform: "tensorflow" } }', []),
        ("", ["lists no model"]),
        ('model_config_list { config { name: "a" base_path: "a" model_platform: "tensorflow" } }', ["is relative"]),
        ('model_config_list { config { name: "a" base_path: "/a" } }', ["model_platform is ''"]),
        ('model_config_list { config { base_path: "/a" model_platform: "tensorflow" } }', ["no name"]),
        (
            'model_config_list { config { name: "a" base_path: "/a" model_platform: "tensorflow" } '
            'config { name: "a" base_path: "/b" model_platform: "tensorflow" } }',
            ["2 models are called 'a'"],
        ),
        ("model_config_lost {", ["is no model server configuration"]),
    ],
)
def test_model_config_file(copied, tmp_path, text, words):
    (tmp_path / "models.config").write_text(text)
    findings = lint.lint(copied, Flags(model_config_file=str(tmp_path / "models.config")), run=False).findings
    reasons = [f.reason for f in findings if f.rule == "model-config"]
    assert len(reasons) == len(words) and all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_files_that_no_flag_reads(copied):
    assert "unused-file" not in found(copied)
    (copied / "1" / "batching_params.pbtxt").write_text("")
    (copied / "1" / "model.tflite").write_bytes(b"")
    assert [where for _, where in found(copied)["unused-file"]] == ["batching_params.pbtxt", "model.tflite"]


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    assert found(tmp_path / "m") == {"unreadable": [("error", "saved_model.pb")]}
    (tmp_path / "m" / "1" / "saved_model.pb").write_bytes(b"\xff\xff damaged")
    assert found(tmp_path / "m") == {"unreadable": [("error", "saved_model.pb")]}
    for path, words in ((tmp_path / "nothing", "no such directory"), (tmp_path, "holds no saved_model.pb")):
        with pytest.raises(TfoptError, match=words):
            lint.lint(path)


# -- signatures


def test_variables_that_the_restore_does_not_fill(built):
    """tf.saved_model.save on a Keras 3 model: it loads in a v1 session, and fails at the first request."""
    rules = found(built("keras3_saved_by_tf"), run=True)
    assert rules["variables-not-restored"] == [("error", "signature 'serving_default'")]
    assert "variables-not-restored" not in found(built("keras3_export"), run=True)


def test_a_model_without_a_kernel_in_its_own_process(shared):
    path = shared / "models" / "tfx-unsupported-op" / "benchmark_trained"
    findings = lint.lint(path).findings
    (error,) = [f for f in findings if f.severity == "error"]
    assert error.rule == "no-kernel" and "BoostedTreesBucketize" in error.reason


def test_inputs_that_nobody_can_guess(tmp_path):
    @tf.function(input_signature=[spec(None)])
    def picky(x):
        with tf.control_dependencies([tf.debugging.assert_equal(x, 12345.0)]):
            return {"y": tf.identity(x)}

    path = saved(tmp_path / "1", serving_default=picky)
    assert found(path, run=True)["signature-fails"] == [("warning", "signature 'serving_default'")]
    np.savez(tmp_path / "rows.npz", x=np.full(3, 12345.0, np.float32))
    assert "signature-fails" not in found(path, Flags(data=str(tmp_path / "rows.npz")), run=True)


def tf1(path, signatures, **options):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 2], "x")
        text = v1.placeholder(tf.string, [None], "text")
        tensors = {"x": x, "y": x + 1.0, "text": text, "scores": tf.strings.to_number(text)[:, None]}
        ends = {name: ({i: tensors[i]}, {o: tensors[o]}) for name, (i, o) in signatures.items()}
        save_tf1(path, session, ends, **options)
    return path


def test_names(tmp_path, plain):
    assert "no-signature" in found(tf1(tmp_path / "1", {}))
    hidden = found(tf1(tmp_path / "2", {"serving_default": ("x", "y"), "__hidden": ("x", "y")}))
    assert hidden["reserved-name"] == [("warning", "signature '__hidden'")] and "no-default-signature" not in hidden
    assert "reserved-name" not in found(plain) and "no-default-signature" in found(plain)


@pytest.mark.parametrize(
    ("method", "ends", "expected"),
    [
        ("tensorflow/serving/classify", ("text", "scores"), None),
        ("tensorflow/serving/classify", ("x", "y"), "warning"),
        ("tensorflow/serving/regress", ("text", "scores"), "warning"),
        ("tensorflow/serving/predict", ("x", "y"), None),
        ("mine", ("x", "y"), "error"),
    ],
)
def test_methods(tmp_path, method, ends, expected):
    path = tf1(tmp_path / "1", {"serving_default": ends}, method=method)
    rules = found(path, Flags(enable_signature_method_name_check=True))
    assert [severity for severity, _ in rules.get("method-name", [])] == ([expected] if expected else [])
    assert method != "mine" or "method-name" not in found(path)


def test_sparse_tensors(built, plain):
    assert found(built("tf1_sparse"))["sparse-tensor"][0][0] == "error"
    assert "sparse-tensor" not in found(plain)


def test_state(built, plain):
    assert [where for _, where in found(built("counter"))["state"]] == ["signature 'count'"]
    assert "state" not in found(plain) and "state" not in found(built("mutable_table"))


# -- ops


def edited(source, path, edit):
    """A copy of a model whose saved_model.pb went through `edit`."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    shutil.copytree(source, path, copy_function=shutil.copyfile)
    model = SavedModel.FromString((path / "saved_model.pb").read_bytes())
    edit(model.meta_graphs[0])
    (path / "saved_model.pb").write_bytes(model.SerializeToString())
    return path


def renamed_op(op):
    def edit(meta):
        node = next(n for n in meta.graph_def.node if n.op == "StatefulPartitionedCall")
        meta.graph_def.node.add(name="extra", op=op, input=["ghost"])
        meta.graph_def.node.add(name="ghost", op="Placeholder")
        node.input.append("^extra")

    return edit


@pytest.mark.parametrize(
    ("op", "rule", "severity"),
    [
        ("TFAddons>Correlation", "custom-op", "error"),
        ("TFText>WhitespaceTokenizeWithOffsetsV2", "linked-op", "info"),
        ("SimpleMLInferenceOpWithHandle", "linked-op", "info"),
        ("PyFunc", "python-op", "error"),
        ("ReadFile", "outside-world", "warning"),
        ("WriteFile", "outside-world", "warning"),
        ("RpcCall", "outside-world", "warning"),
        ("Relu", None, None),
    ],
)
def test_ops(plain, tmp_path, op, rule, severity):
    rules = found(edited(plain, tmp_path / "1", renamed_op(op)))
    assert {
        r: [s for s, _ in w] for r, w in rules.items() if r in ("custom-op", "linked-op", "python-op", "outside-world")
    } == ({rule: [severity]} if rule else {})


def test_jit_compile(tmp_path, plain):
    path = saved(tmp_path / "1", serving_default=function(lambda x: {"y": x * 2.0}, spec(None, 3), jit_compile=True))
    assert found(path)["jit-compile"][0][0] == "error"
    assert "jit-compile" not in found(path, Flags(xla_cpu_compilation_enabled=True))
    assert "jit-compile" not in found(plain)


def test_random_numbers(tmp_path, plain):
    path = saved(tmp_path / "1", serving_default=function(lambda x: {"y": x + tf.random.normal([3])}, spec(None, 3)))
    ((severity, where),) = found(path)["probable-bug"]
    assert severity == "warning" and "RandomStandardNormal" in where
    assert "probable-bug" not in found(plain)


# -- batching


@pytest.mark.parametrize(
    ("specs", "call", "where"),
    [
        ([spec(None, 4)], lambda x: {"y": x}, []),
        ([spec(2, 4)], lambda x: {"y": x}, ["input 'x'"]),
        ([spec(None, 4), spec(name="t")], lambda x, t: {"y": x * t}, ["input 't'"]),
        ([spec(1, 4, name="user"), spec(None, 4)], lambda user, x: {"y": x * user}, ["input 'user'"]),
        ([spec(None, 4)], lambda x: {"y": x, "sum": tf.reduce_sum(x)}, ["output 'sum'"]),
        ([spec(None, 4)], lambda x: {"y": x, "c": tf.ones([7])}, ["output 'c'"]),
    ],
)
def test_dimension_0(tmp_path, specs, call, where):
    path = saved(tmp_path / "1", serving_default=function(call, *specs))
    wheres = [
        w.removeprefix("signature 'serving_default': ")
        for _, w in found(path, BATCHING).get("batching-dimension-0", [])
    ]
    assert wheres == where
    assert "batching-dimension-0" not in found(path)


def test_what_only_a_run_shows(tmp_path):
    """Rows that are compared with each other, and outputs of unknown shape that have not one row for each."""
    path = saved(
        tmp_path / "1",
        normed=function(lambda x: {"y": x - tf.reduce_mean(x, 0)}, spec(None, 4)),
        flat=function(
            lambda x: {"y": tf.reshape(x, tf.concat([[-1], tf.ones_like(tf.shape(x)[1:])], 0))}, spec(None, 4)
        ),
        good=function(lambda x: {"y": tf.nn.softmax(x)}, spec(None, 4)),
    )
    rules = found(path, BATCHING, run=True)
    assert rules["batch-mixes-rows"] == [("error", "signature 'normed'")]
    assert rules["batching-dimension-0"] == [("error", "signature 'flat': output 'y'")]
    assert found(path, run=True)["batch-mixes-rows"] == [("warning", "signature 'normed'")]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("max_batch_size { value: 4 } allowed_batch_sizes: [2, 4]", {}),
        ("max_batch_size { value: 4 } allowed_batch_sizes: [2, 3]", {"batching-parameters": "error"}),
        ("max_batch_size { value: 4 } max_execution_batch_size { value: 2 }", {"batching-parameters": "warning"}),
        (
            "max_batch_size { value: 4 } max_execution_batch_size { value: 2 } allowed_batch_sizes: 2 "
            "enable_large_batch_splitting { value: true }",
            {"batching-parameters": "warning"},
        ),
    ],
)
def test_parameters(plain, tmp_path, text, rules):
    (tmp_path / "b.pbtxt").write_text(text)
    seen = found(plain, Flags(enable_batching=True, batching_parameters_file=str(tmp_path / "b.pbtxt")))
    assert {rule: found[0][0] for rule, found in seen.items() if rule.startswith("batching")} == rules


def test_batching_flags(copied):
    assert found(copied, Flags(batching_parameters_file="x"))["batching-off"][0] == (
        "warning", "--batching_parameters_file",
    )  # fmt: skip
    assert found(copied, BATCHING)["batching-defaults"][0][0] == "info"
    per_model = Flags(enable_batching=True, enable_per_model_batching_parameters=True)
    assert found(copied, per_model)["batching-off"] == [("warning", "1/batching_params.pbtxt")]
    (copied / "1" / "batching_params.pbtxt").write_text("max_batch_size { value: 4 }")
    assert not {"batching-off", "batching-defaults", "unused-file"} & found(copied, per_model).keys()


def test_variable_lengths(tmp_path, plain):
    path = saved(tmp_path / "1", serving_default=function(lambda x: {"y": x}, spec(None, None, 3)))
    assert found(path, BATCHING)["batching-padding"] == [
        ("warning", "signature 'serving_default': input 'x' (?, ?, 3)")
    ]
    (tmp_path / "b.pbtxt").write_text("pad_variable_length_inputs: true")
    padded = Flags(enable_batching=True, batching_parameters_file=str(tmp_path / "b.pbtxt"))
    assert found(path, padded)["batching-padding"][0][0] == "info"
    assert "batching-padding" not in found(path) and "batching-padding" not in found(plain, BATCHING)


# -- warmup


def rewrite(path, logs):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


def test_warmup(copied):
    assert found(copied)["no-warmup"][0][0] == "info"
    assert "no-warmup" not in found(copied, Flags(enable_model_warmup=False))
    path = warmup.write(copied / "1", [1]).path
    good = list(warmup.read(path))
    assert not any(rule.startswith("warmup") for rule in found(copied, run=True))

    rewrite(path, good[:1])
    assert found(copied)["warmup-incomplete"][0][0] == "info"
    rewrite(path, good * 501)
    assert found(copied)["warmup-too-many"][0][0] == "error"
    path.write_bytes(b"this is no TFRecord, but long")
    assert found(copied)["warmup-fails"][0][0] == "error"

    stale = warmup.make_log("gone", lint_signature(copied), {"x": np.ones((1, 4), np.float32)})
    rewrite(path, [*good, stale])
    assert found(copied)["warmup-stale"][0][0] == "error"
    rewrite(path, [*good, warmup.make_log("score", lint_signature(copied), {"x": np.ones((1, 5), np.float32)})])
    rules = found(copied, run=True)
    assert rules["warmup-fails"][0][0] == "error" and "warmup-stale" not in rules


def lint_signature(base):
    with warmup.Session(base / "1") as session:
        return session.signatures["score"]


def test_warmup_of_state(built, tmp_path):
    model = tmp_path / "1"
    shutil.copytree(built("counter"), model, copy_function=shutil.copyfile)
    path = warmup.write(model, [1]).path
    assert "warmup-state" not in found(model)
    with warmup.Session(model) as session:
        log = warmup.make_log("count", session.signatures["count"], {"x": np.ones((1, 4), np.float32)})
    rewrite(path, [log])
    assert found(model)["warmup-state"] == [("warning", "signature 'count'")]


# -- TFLite


TFLITE = Flags(prefer_tflite_model=True)


def tflite(path, call, *specs, select=False):
    """A version with a SavedModel and what the converter makes of it."""
    saved(path, serving_default=function(call, *specs), other=function(call, *specs))
    converter = tf.lite.TFLiteConverter.from_saved_model(str(path), signature_keys=["serving_default"])
    if select:
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    (path / "model.tflite").write_bytes(converter.convert())
    return path


def test_tflite(tmp_path):
    from tfopt.export import serving_tflite
    from tfopt.model import read_meta_graph

    path = tflite(tmp_path / "1", lambda x: {"y": x * 2.0}, spec(None, 4))
    raw = found(path, TFLITE)
    assert raw["tflite-metadata"][0][0] == "warning" and "unused-file" not in raw
    signatures = dict(read_meta_graph(path).signature_def)
    serving_tflite.add(path, path / "model.tflite", {k: v for k, v in signatures.items() if not k.startswith("__")})
    rules = found(path, TFLITE)
    assert rules["tflite-signatures"] == [("warning", "model.tflite")] and "tflite-metadata" not in rules
    assert not any(severity == "error" for found in rules.values() for severity, _ in found)
    (path / "model.tflite").write_bytes(b"nothing")
    assert found(path, TFLITE)["tflite-unreadable"][0][0] == "error"
    (path / "model.tflite").unlink()
    assert found(path, TFLITE)["tflite-missing"] == [("warning", "model.tflite")]
    assert not any(rule.startswith("tflite") for rule in found(path))


def test_tflite_with_select_ops_and_a_fixed_batch(tmp_path):
    flags = Flags(prefer_tflite_model=True, enable_batching=True)
    path = tflite(tmp_path / "1", lambda x: {"y": tf.linalg.inv(x)}, spec(1, 3, 3), select=True)
    rules = found(path, flags)
    assert rules["tflite-op"] == [("error", "model.tflite: FlexMatrixInverse")]
    assert rules["tflite-fixed-batch"][0][0] == "error"


def test_a_version_that_is_tflite_alone(shared):
    path = shared / "models" / "tf-serving-testdata" / "saved_model_half_plus_two_tflite"
    assert found(path, TFLITE)["tflite-metadata"][0][0] == "warning"
    assert found(path) == {"unreadable": [("error", "saved_model.pb")]}


# -- what comes out


def test_the_result(copied, monkeypatch):
    monkeypatch.setattr(
        lint_subject.Subject,
        "probe",
        Probe(trials={n: Trial(error="\x1b[31mno OpKernel") for n in ("score", "double")}),
    )
    result = lint.lint(copied)
    text = result.text()
    assert text.splitlines()[0] == str(copied / "1") and "\x1b" not in text
    assert text.count("none of the inputs") == 1 and "signature 'double'" in text and "signature 'score'" in text
    assert text.splitlines()[-1] == "0 errors, 2 warnings, 2 remarks" and not result.failed
    read = json.loads(result.to_json())
    assert read["flags"]["enable_batching"] is False
    assert read["findings"][0].keys() == {"rule", "severity", "where", "reason", "todo"}


def test_real_models_have_no_errors(shared):
    """What is served every day is not found fault with; a stateful model with a fixed batch is."""
    for name in ("kws-ds-cnn/saved_model", "tfx-penguin"):
        assert not lint.lint(shared / "models" / name, BATCHING).failed, name
    assert lint.lint(shared / "models" / "dtln" / "saved_model", BATCHING, run=False).failed
