from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pipelines import train_digits
from tests.conftest import REPO

MODEL = REPO / "saved_models" / "digits"


def script(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipelines.train_digits", *flags]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)


def test_bundled_model_is_small_and_accurate(tmp_path):
    import tensorflow as tf

    train_digits.write_data(tmp_path, seed=0)
    data = np.load(tmp_path / "eval.npz")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(MODEL))
        signature = meta.signature_def["serving_default"]
        assert list(signature.inputs) == ["image"]
        (output,) = signature.outputs.values()
        scores = session.run(output.name, {signature.inputs["image"].name: data["image"]})
    assert len(data["label"]) == 540
    assert np.mean(scores.argmax(1) == data["label"]) >= train_digits.MIN_ACCURACY
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 1_000_000


def test_data_is_split_without_overlap():
    train_x, train_y, eval_x, eval_y = train_digits.split(seed=3)
    assert train_x.dtype == np.float32 and train_x.shape[1:] == (8, 8, 1)
    assert train_x.min() == 0.0 and train_x.max() == 1.0
    assert len(train_x) == len(train_y) and len(eval_x) == len(eval_y) == 540
    assert len(train_x) + len(eval_x) == 1797
    assert np.array_equal(np.unique(eval_y), np.arange(10))


def test_representative_data_holds_no_labels(tmp_path):
    result = script(f"--data_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    data = np.load(tmp_path / "representative.npz")
    assert data.files == ["image"] and data["image"].shape == (256, 8, 8, 1)


@pytest.mark.parametrize(
    "flags, line",
    [
        ([], "nothing to do"),
        (["extra"], "Received: extra"),
        ([f"--output={MODEL}"], "exists: give another path or --overwrite"),
    ],
)
def test_bad_usage_is_one_line(flags, line):
    result = script(*flags)
    assert result.returncode == 2
    assert line in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_one_epoch_is_not_enough_and_leaves_nothing(tmp_path):
    result = script(f"--output={tmp_path / 'digits'}", "--epochs=1")
    assert result.returncode == 2 and "needs 0.97" in result.stderr
    assert list(tmp_path.iterdir()) == []
