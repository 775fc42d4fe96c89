"""Inference on Beam writes the files of one process, byte for byte, also where a worker is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

from tests.conftest import REPO
from tfopt import prediction_records
from tfopt.errors import TfoptError
from tfopt.inference import infer

MODEL = str(REPO / "saved_models" / "digits")
ONE = "--direct_running_mode=multi_processing --direct_num_workers=1"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    np.savez(path, image=np.random.default_rng(0).random((200, 8, 8, 1), np.float32))
    return str(path)


def contents(files):
    return [Path(file).read_bytes() for file in files]


class DiesOnce(prediction_records.Encoder):
    """Kills its process in the middle, once."""

    def records(self, batch, outputs):
        marker = Path(os.environ["TFOPT_TEST_MARKER"])
        if batch.start == 96 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().records(batch, outputs)


@pytest.mark.parametrize("format", ["example", "prediction_log"])
def test_the_files_of_one_process(source, tmp_path, format):
    here = infer(MODEL, source, f"{tmp_path}/here/", format=format, shards=9)
    there = infer(MODEL, source, f"{tmp_path}/there/", format=format, shards=9, beam_args="")
    assert (here.rows, there.rows) == (200, 200)
    assert contents(here.files) == contents(there.files)
    assert sorted((tmp_path / "there").iterdir()) == sorted(map(Path, there.files))


def test_a_killed_worker_loses_and_doubles_nothing(source, tmp_path, monkeypatch):
    here = infer(MODEL, source, f"{tmp_path}/here/", shards=2)
    monkeypatch.setenv("TFOPT_TEST_MARKER", str(tmp_path / "marker"))
    monkeypatch.setattr("tfopt.inference.Encoder", DiesOnce)
    there = infer(MODEL, source, f"{tmp_path}/there/", shards=2, beam_args=ONE)
    assert (tmp_path / "marker").exists() and there.rows == 200
    assert contents(here.files) == contents(there.files)
    assert sorted((tmp_path / "there").iterdir()) == sorted(map(Path, there.files))


def test_nothing_is_left_of_a_failed_run(source, tmp_path):
    with pytest.raises(TfoptError, match="no --nope"):
        infer(MODEL, source, f"{tmp_path}/", beam_args="--nope")
    assert not list(tmp_path.iterdir())


def test_taxi_trips_keep_their_key(shared, tmp_path):
    model = next((shared / "models/tfx-chicago-taxi").rglob("saved_model.pb")).parent
    trips = str(shared / "data/chicago-taxi/tfexamples/Split-eval/*-0000[01]-of-*.gz")
    options = {"keep": ["trip_start_hour"], "limit": 300, "shards": 2}
    here = infer(model, trips, f"{tmp_path}/here/", **options)
    there = infer(model, trips, f"{tmp_path}/there/", beam_args="", **options)
    assert here.rows == there.rows == 300 and contents(here.files) == contents(there.files)


def test_threads_share_a_tflite_file(shared, tmp_path):
    model = shared / "models/kws-ds-cnn/kws_ref_model_float32.tflite"
    rows = np.load(shared / "data/kws/kws01_first500.npz")["input_1"][:100]
    np.savez(tmp_path / "rows.npz", input_1=rows.astype(np.float32))
    source = str(tmp_path / "rows.npz")
    threads = "--direct_running_mode=multi_threading --direct_num_workers=2"
    here = infer(model, source, f"{tmp_path}/here/", shards=2, threads=1)
    there = infer(model, source, f"{tmp_path}/there/", shards=2, threads=1, beam_args=threads)
    assert contents(here.files) == contents(there.files) and here.rows == there.rows == 100
