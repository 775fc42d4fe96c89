"""Inference on Beam writes the files of one process, byte for byte, also where a worker is killed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

from apache_beam.io.localfilesystem import LocalFileSystem
from apache_beam.ml.inference.base import PredictionResult

from tests.conftest import REPO
from tfopt import prediction_records
from tfopt.beam import infer as on_beam
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


def test_a_runner_that_loses_rows_is_found_out(source, tmp_path, monkeypatch):
    real = on_beam._encode

    def lose(result, *arguments):
        if result.example.start == 32:
            result = PredictionResult(
                result.example.take(slice(0, 31)), {k: v[:31] for k, v in result.inference.items()}
            )
        return real(result, *arguments)

    monkeypatch.setattr(on_beam, "_encode", lose)
    with pytest.raises(TfoptError, match="gave back 199 rows of 200: it lost or doubled some"):
        infer(MODEL, source, f"{tmp_path}/out/", beam_args="")
    assert not list(tmp_path.iterdir())


def test_taxi_trips_keep_their_key(shared, tmp_path):
    model = next((shared / "models/tfx-chicago-taxi").rglob("saved_model.pb")).parent
    trips = str(shared / "data/chicago-taxi/tfexamples/Split-eval/*-0000[01]-of-*.gz")
    options = {"keep": ["trip_start_hour"], "limit": 300, "shards": 2}
    here = infer(model, trips, f"{tmp_path}/here/", **options)
    there = infer(model, trips, f"{tmp_path}/there/", beam_args="", **options)
    assert here.rows == there.rows == 300 and contents(here.files) == contents(there.files)


def test_a_tflite_file(shared, tmp_path):
    model = shared / "models/kws-ds-cnn/kws_ref_model_float32.tflite"
    rows = np.load(shared / "data/kws/kws01_first500.npz")["input_1"][:100]
    np.savez(tmp_path / "rows.npz", input_1=rows.astype(np.float32))
    source = str(tmp_path / "rows.npz")
    here = infer(model, source, f"{tmp_path}/here/", shards=2)
    there = infer(model, source, f"{tmp_path}/there/", shards=2, beam_args="")
    assert contents(here.files) == contents(there.files) and here.rows == there.rows == 100


class Remote(LocalFileSystem):
    """remote://x is what the environment calls x; Beam finds the class by its scheme."""

    @classmethod
    def scheme(cls):
        return "remote"

    def _real(self, path):
        return path.replace("remote:/", os.environ["TFOPT_TEST_REMOTE"])

    def join(self, base, *paths):
        return "/".join([base.rstrip("/"), *paths])

    def match(self, patterns, limits=None):
        found = super().match([self._real(pattern) for pattern in patterns], limits)
        for matched in found:
            for meta in matched.metadata_list:
                meta.path = meta.path.replace(os.environ["TFOPT_TEST_REMOTE"], "remote:/")
        return found

    def mkdirs(self, path):
        return super().mkdirs(self._real(path))

    def create(self, path, *arguments, **options):
        return super().create(self._real(path), *arguments, **options)

    def open(self, path, *arguments, **options):
        return super().open(self._real(path), *arguments, **options)

    def rename(self, old, new):
        return super().rename([self._real(p) for p in old], [self._real(p) for p in new])

    def exists(self, path):
        return super().exists(self._real(path))

    def delete(self, paths):
        return LocalFileSystem(None).delete([self._real(path) for path in paths])


def test_remote_artifacts_and_outputs(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TFOPT_TEST_REMOTE", str(tmp_path / "bucket"))
    shutil.copytree(MODEL, tmp_path / "bucket/digits")
    (tmp_path / "bucket/out").mkdir()
    here = infer(MODEL, source, f"{tmp_path}/here/", shards=2)
    there = infer("remote://digits", source, "remote://out/", shards=2, beam_args="")
    assert there.files[0] == "remote://out/predictions-00000-of-00002.tfrecord.gz"
    files = [tmp_path / "bucket/out" / Path(file).name for file in there.files]
    assert contents(here.files) == contents(files) and sorted((tmp_path / "bucket/out").iterdir()) == files
    with pytest.raises(TfoptError, match="is there already; pass --overwrite"):
        infer("remote://digits", source, "remote://out/", shards=3, beam_args="")
    infer("remote://digits", source, "remote://out/", shards=1, beam_args="", overwrite=True)
    assert [file.name for file in (tmp_path / "bucket/out").iterdir()] == ["predictions-00000-of-00001.tfrecord.gz"]
