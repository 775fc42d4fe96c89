"""TensorFlow Serving's batching parameters: the texts of its documentation, its rules, its defaults."""

from __future__ import annotations

import os

import pytest

from tfopt.errors import TfoptError
from tfopt.serving import batching_parameters
from tfopt.serving.batching_parameters import BatchingParameters, parse, read

DOCUMENTED = """
# comment
max_batch_size { value: 128 }
batch_timeout_micros { value: 0 }
max_enqueued_batches { value: 1000000 }
num_batch_threads { value: 8 }
thread_pool_name { value: "a \\"name\\"" }
allowed_batch_sizes: 8
allowed_batch_sizes: [32, 128]
pad_variable_length_inputs: true
"""


def test_reads_the_documented_form(tmp_path):
    file = tmp_path / "batching_params.pbtxt"
    file.write_text(DOCUMENTED)
    found = read(file)
    assert found == BatchingParameters(
        max_batch_size=128,
        batch_timeout_micros=0,
        max_enqueued_batches=1000000,
        num_batch_threads=8,
        thread_pool_name='a "name"',
        allowed_batch_sizes=(8, 32, 128),
        pad_variable_length_inputs=True,
    )
    assert parse(found.text()) == found


@pytest.mark.parametrize(
    "parameters",
    [
        BatchingParameters(),
        BatchingParameters(batch_timeout_micros=0),
        BatchingParameters(allowed_batch_sizes=(8, 1000)),
        BatchingParameters(enable_large_batch_splitting=False),
        BatchingParameters(
            max_batch_size=64,
            max_execution_batch_size=16,
            enable_large_batch_splitting=True,
            allowed_batch_sizes=(4, 16),
        ),
        BatchingParameters(thread_pool_name="größe\n\\"),
    ],
)
def test_text_round_trips(parameters):
    assert parse(parameters.text()) == parameters


def test_defaults_are_those_of_the_scheduler():
    filled = BatchingParameters().filled()
    assert filled.max_batch_size == filled.max_execution_batch_size == 1000
    assert filled.batch_timeout_micros == 0
    assert filled.max_enqueued_batches == 10
    assert filled.num_batch_threads == len(os.sched_getaffinity(0))
    assert filled.thread_pool_name == "batch_threads"
    assert filled.enable_large_batch_splitting is False
    split = BatchingParameters(max_batch_size=64, max_execution_batch_size=16, enable_large_batch_splitting=True)
    assert (split.filled().max_batch_size, split.filled().max_execution_batch_size) == (64, 16)
    assert filled.filled() == filled


def test_padding():
    parameters = BatchingParameters(max_batch_size=32, allowed_batch_sizes=(1, 8, 32))
    assert [parameters.padded(rows) for rows in (1, 2, 8, 9, 32, 40)] == [1, 8, 8, 32, 32, 40]
    assert BatchingParameters().padded(5) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch_size { value: 0 }", "max_batch_size is 0"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros is -1"),
        ("max_enqueued_batches { value: 0 }", "max_enqueued_batches is 0"),
        ("num_batch_threads { value: 0 }", "num_batch_threads is 0"),
        ("allowed_batch_sizes: 8", "ends at 8; the last one must be max_batch_size (1000, the default)"),
        ("max_batch_size { value: 32 } allowed_batch_sizes: [8, 16]", "must be max_batch_size (32)"),
        ("max_batch_size { value: 16 } allowed_batch_sizes: [8, 8, 16]", "8 follows 8"),
        ("max_batch_size { value: 16 } allowed_batch_sizes: [32, 16]", "16 follows 32"),
        ("max_batch_size { value: 16 } allowed_batch_sizes: [0, 16]", "allowed_batch_sizes holds 0"),
        (
            "max_batch_size { value: 32 } max_execution_batch_size { value: 16 } allowed_batch_sizes: 16",
            "must be max_batch_size (32)",  # the other has no effect without splitting
        ),
        ("enable_large_batch_splitting { value: true }", "needs max_execution_batch_size or max_batch_size"),
        (
            "max_batch_size { value: 8 } max_execution_batch_size { value: 16 } "
            "enable_large_batch_splitting { value: true }",
            "more than max_batch_size (8)",
        ),
        ("max_batch_size: 32", "max_batch_size { value: 32 }"),
        ("max_batch_sise { value: 32 }", "unknown field 'max_batch_sise' (line 1)"),
        ("max_batch_size { value: many }", "many"),
        ("max_batch_size {", "file.pbtxt"),
    ],
)
def test_what_serving_refuses_is_one_line(text, words):
    with pytest.raises(TfoptError) as caught:
        parse(text, "file.pbtxt")
    assert words in str(caught.value)
    assert str(caught.value).startswith("file.pbtxt: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TfoptError, match=r"nothing\.pbtxt: cannot be read: No such file"):
        read(tmp_path / "nothing.pbtxt")
    assert batching_parameters.FILE == "batching_params.pbtxt"
