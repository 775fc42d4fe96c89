"""Students: another SavedModel or Keras file takes the original's place, under the original's names."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import randomise_batch_norms
from tests.origins import rows, spec
from tests.training_test import X, Y, _net, accuracy, data
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.model import load
from tfopt.passes import Data, distill
from tfopt.recipe import NAMED, parse
from tfopt.rewrite import Log
from tfopt.training import Settings, fine_tune

CENTRES = rows(4, 8, 8, 1, seed=4)
CLASS = np.random.default_rng(5).integers(0, 4, 512)
IMAGES = CENTRES[CLASS] + 1.2 * rows(512, 8, 8, 1, seed=6)


def convnet(library, path, channels, trained=False):
    """A Keras net with batch norms and dropout; trained on four classes of noisy patterns."""
    if library == "keras":
        import keras
    else:
        import tf_keras as keras
    keras.utils.set_random_seed(1)
    layers = keras.layers
    body = []
    for count in channels:
        body += [layers.Conv2D(count, 3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    ends = [layers.MaxPooling2D(2), layers.Flatten(), layers.Dropout(0.1), layers.Dense(4, activation="softmax")]
    model = keras.Sequential([layers.Input((8, 8, 1), name="image"), *body, *ends])
    if trained:
        model.compile("adam", "sparse_categorical_crossentropy")
        model.optimizer.learning_rate = 1e-2
        model.fit(IMAGES, CLASS, batch_size=32, epochs=6, verbose=0)
    else:
        randomise_batch_norms(model)  # a net that knows nothing
    if path.suffix:
        model.save(path)
    else:
        model.export(path, verbose=False)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load(convnet("keras", tmp_path_factory.mktemp("teacher") / "model", [16, 16], trained=True))


def right(model):
    (name,) = model.signatures["serving_default"].inputs
    with Function(model) as function:
        (scores,) = function("serving_default", {name: IMAGES}).values()
    return float(np.mean(scores.argmax(1) == CLASS))


OPTIONS = {"epochs": 12, "batch_size": 32, "learning_rate": 1e-2, "min_steps": 0}


@pytest.mark.parametrize(
    ("library", "suffix"), [("keras", ".keras"), ("tf_keras", ".h5"), ("keras", "")], ids=["keras3", "keras2", "export"]
)
def test_a_smaller_net_learns_from_scratch(teacher, library, suffix, tmp_path):
    path = convnet(library, tmp_path / f"student{suffix}", [6])
    given = Data("serving_default", teacher, rows=data(image=IMAGES))
    model, log = teacher.copy(), Log()
    distill.run(model, log, given, student=str(path), **OPTIONS)
    for name, signature in teacher.signatures.items():
        assert model.signatures[name].inputs.keys() == signature.inputs.keys() == {"image"}
        assert model.signatures[name].outputs.keys() == signature.outputs.keys()
    assert right(teacher) > 0.9
    assert right(model) > right(teacher) - 0.05
    assert log.applied["model replaced by a student"] == 1 and log.applied["weight trained"] >= 3
    assert any("rows held back" in note for note in log.notes)
    assert not {"Rsqrt", "FusedBatchNormV3"} & {node.op for node in model.graph.nodes.values()}  # folded
    assert model.weight_bytes < teacher.weight_bytes / 2


@pytest.mark.slow
def test_its_training_goes_on_where_it_was_killed(teacher, tmp_path):
    """Batch statistics and the states of dropout are part of it: killed in the child, it ends with the same weights."""
    import os
    import signal
    import threading
    import time

    from tests.pipelines.kill_test import marked

    path = convnet("keras", tmp_path / "student.keras", [6])
    results = []
    for state in (None, tmp_path / "state"):
        given = Data("serving_default", teacher, rows=data(image=IMAGES), checkpoint=state)
        if state:
            mark = f"{tmp_path / 'mark'}"
            os.environ["TFOPT_TEST_MARK"] = mark

            def kill(mark=mark, state=state):
                while not (state / "distill" / "training.npz").exists():
                    time.sleep(0.002)
                for pid in marked(mark):
                    if pid != os.getpid():
                        os.kill(pid, signal.SIGKILL)

            threading.Thread(target=kill).start()
            with pytest.raises(TfoptError, match="SIGKILL"):
                distill.run(teacher.copy(), Log(), given, student=str(path), **{**OPTIONS, "epochs": 4})
            del os.environ["TFOPT_TEST_MARK"]
        model = teacher.copy()
        distill.run(model, Log(), given, student=str(path), **{**OPTIONS, "epochs": 4})
        results.append({n.name: model.graph.constant(n.name) for n in model.graph.nodes.values()})
    first, second = results
    assert first.keys() == second.keys()
    assert all(np.array_equal(v, second[n]) for n, v in first.items() if v is not None)


def test_labels_teach_a_student_too(tmp_path):
    teacher = _net(tmp_path / "teacher")
    settings = Settings(epochs=25, learning_rate=1e-2, batch_size=32, patience=0)
    fine_tune(teacher, "serving_default", None, None, data(Y, x=X), settings)
    _net(tmp_path / "student", seed=7)
    model = teacher.copy()
    given = Data("serving_default", teacher, rows=data(x=X[:256]), labelled=data(Y[256:], x=X[256:]))
    distill.run(
        model, Log(), given, student=str(tmp_path / "student"), **{**OPTIONS, "epochs": 60, "teacher_until": 0.5}
    )
    assert accuracy(model) > accuracy(teacher) - 0.05


class _Ends(tf.Module):
    """Two inputs and two outputs, under any names."""

    def __init__(self, names, width=5):
        super().__init__()
        self.kernel = tf.Variable(rows(width, 3))
        x, gain, y, total = names
        specs = {x: spec(None, width, name=x), gain: spec(None, 1, name=gain)}

        def serve(**given):
            value = given[gain] * tf.tanh(given[x] @ self.kernel)
            return {y: value, total: tf.reduce_sum(value, 1)}

        self.serve = tf.function(serve, autograph=False).get_concrete_function(**specs)


def _ends(path, *names, width=5):
    module = _Ends(names, width)
    tf.saved_model.save(module, str(path), {"serving_default": module.serve})
    return load(path)


def test_names_are_taken_over_from_the_original(tmp_path):
    teacher = _ends(tmp_path / "teacher", "x", "gain", "y", "total")
    _ends(tmp_path / "student", "a", "b", "c", "d")
    model, log = teacher.copy(), Log()
    distill.run(model, log, Data("serving_default", teacher), student=str(tmp_path / "student"), epochs=0)
    inputs = {"x": rows(4, 5, seed=9), "gain": rows(4, 1, seed=8)}
    with Function(model) as ours, Function(teacher) as theirs:
        a, b = ours("serving_default", inputs), theirs("serving_default", inputs)
    assert a.keys() == b.keys() == {"y", "total"}
    assert all(np.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert not log.warnings


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            lambda path: _ends(path, "x", "gain", "y", "total", width=4),
            r"input 'x' of the model, float32 \[None, 5\], has",
        ),
        (lambda path: _net(path), "input 'gain' of the model, .*, has no counterpart"),
        (lambda path: None, "there is no model at"),
    ],
)
def test_students_that_do_not_fit(student, message, tmp_path):
    teacher = _ends(tmp_path / "teacher", "x", "gain", "y", "total")
    student(tmp_path / "student")
    with pytest.raises(TfoptError, match=message):
        distill.run(
            teacher.copy(), Log(), Data("serving_default", teacher), student=str(tmp_path / "student"), epochs=0
        )


def test_a_student_replaces_what_earlier_passes_made(tmp_path):
    first = {"pass": "distill", "student": "there"}
    parse([*NAMED["lossless"]["passes"], first, "prune_magnitude"], "good")
    with pytest.raises(
        TfoptError, match=r"distill with a student would replace what prune_magnitude \(pass 11\) made; put it e"
    ):
        parse([*NAMED["lossless"]["passes"], "prune_magnitude", first], "bad")
