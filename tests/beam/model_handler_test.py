"""The digits model over rows, on the DirectRunner in memory and with two processes: the bits of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference

from tests.conftest import REPO
from tfopt import data, inference_job, runtime
from tfopt.beam import pipeline
from tfopt.beam.model_handler import LockedProgram, ProgramHandler
from tfopt.beam.rows import ReadRows
from tfopt.errors import TfoptError

MODEL = str(REPO / "saved_models" / "digits")
MODES = ["", "--direct_running_mode=multi_processing --direct_num_workers=2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with runtime.open(MODEL, threads=1) as program:
        specs = program.signatures["serving_default"].inputs
    (name,) = specs
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    image = np.random.default_rng(0).random((50, *specs[name].shape[1:]), np.float32)
    np.savez(path, **{name: image, "label": np.arange(50) % 10})
    return str(path), specs


@pytest.mark.parametrize("beam_args", MODES)
def test_the_same_bits_as_in_one_process(rows, beam_args):
    source, specs = rows

    def build(root):
        return (
            root
            | ReadRows(source, specs, batch_size=16)
            | RunInference(ProgramHandler(MODEL, "serving_default"))
            | beam.Map(lambda r: (r.example.start, r.example.labels.tolist(), r.inference))
            | beam.combiners.ToList()
        )

    found = sorted(pipeline.run(build, beam_args), key=lambda item: item[0])
    assert [first for first, *_ in found] == [0, 16, 32, 48]
    assert [label for _, labels, _ in found for label in labels] == [i % 10 for i in range(50)]
    with runtime.open(MODEL, threads=1) as program:
        whole = data.load(source, specs)
        for start, (_, _, outputs) in zip(range(0, 50, 16), found, strict=True):
            expected = inference_job.call(program, "serving_default", whole.take(slice(start, start + 16)))
            for name, array in expected.items():
                np.testing.assert_array_equal(array, outputs[name])


def test_a_missing_artifact_is_one_line():
    with pytest.raises(TfoptError, match="/no/such: not there on the worker"):
        LockedProgram("/no/such")


def test_threads_share_a_tflite_file(shared):
    rows = np.load(shared / "data/kws/kws01_first500.npz")["input_1"].astype(np.float32)
    whole = data.Dataset({"input_1": rows}, None, "rows")
    batches = [whole.take(slice(start, start + 20)) for start in range(0, 400, 20)]
    model = LockedProgram(str(shared / "models/kws-ds-cnn/kws_ref_model_float32.tflite"))
    (signature,) = model.signatures
    alone = [inference_job.call(model, signature, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: inference_job.call(model, signature, batch), batches))
    for a, b in zip(alone, together, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
