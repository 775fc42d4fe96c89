"""One result, whatever happens to the workers: they are killed in the middle, and before they have begun."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

import apache_beam as beam

from tfopt.beam import pipeline
from tfopt.errors import TfoptError

ONE = "--direct_running_mode=multi_processing --direct_num_workers=1"
TWO = "--direct_running_mode=multi_processing --direct_num_workers=2"


class Dies(beam.DoFn):
    """Passes numbers on; the process ends itself at one of them, `times` times in all."""

    def __init__(self, folder: Path, times: int):
        self._folder = str(folder)
        self._times = times

    def process(self, number):
        so_far = len(list(Path(self._folder).iterdir()))
        if number == 20 and so_far < self._times:
            Path(self._folder, str(so_far)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield number


def summing(step):
    def build(root):
        return root | beam.Create(range(40)) | beam.Reshuffle() | step | beam.combiners.ToList()

    return build


@pytest.mark.parametrize("beam_args", ["", "--runner=DirectRunner --direct_running_mode=in_memory"])
def test_one_result(beam_args):
    assert sorted(pipeline.run(summing(beam.Map(lambda x: x + 1)), beam_args)) == list(range(1, 41))


def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(tmp_path, capsys):
    found = pipeline.run(summing(beam.ParDo(Dies(tmp_path, 1))), TWO)
    assert sorted(found) == list(range(40))
    assert capsys.readouterr().err.splitlines() == [
        "warning: Beam: a worker process died (SIGKILL): the pipeline starts again from the beginning (run 2 of 3)"
    ]


def test_workers_that_die_every_time_are_one_line(tmp_path):
    with pytest.raises(TfoptError, match=r"^Beam: a worker process died \(SIGKILL\), in each of 1 runs: .*$"):
        pipeline.run(summing(beam.ParDo(Dies(tmp_path, 9))), ONE, runs=1)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_worker_killed_before_it_connects_hangs_nothing(monkeypatch):
    monkeypatch.setenv("TFOPT_TEST", f"{os.getpid()}")
    mark = f"TFOPT_TEST={os.getpid()}\0".encode()
    killed = []

    def kill_first():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    ours = mark in (process / "environ").read_bytes()
                    if ours and b"sdk_worker_main" in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(process.name)
                        return
                except OSError:
                    continue  # it is gone, or another user's
            time.sleep(0.01)

    thread = threading.Thread(target=kill_first)
    thread.start()
    assert len(pipeline.run(summing(beam.Map(lambda x: x)), ONE)) == 40
    thread.join()
    assert killed


def raises(number):
    raise TfoptError(f"row {number}: wants 'x'")


def fails(number):
    raise ValueError("bad\nrow")


@pytest.mark.parametrize(
    ("step", "beam_args", "message"),
    [
        (raises, "", r"^row \d+: wants 'x'$"),
        (raises, ONE, r"^row \d+: wants 'x'$"),
        (fails, "", r"^Beam: ValueError: bad row \(in step 'Map\(fails\)'\)$"),
    ],
)
def test_what_a_step_raises_is_one_line(step, beam_args, message):
    with pytest.raises(TfoptError, match=message):
        pipeline.run(summing(beam.Map(step)), beam_args)


@pytest.mark.parametrize(
    ("beam_args", "message"),
    [
        ("--nope=3", "Beam's DirectRunner knows no --nope"),
        ("junk", "Beam's DirectRunner knows no junk"),
        ("--direct_num_workers=x", "argument --direct_num_workers: invalid int value: 'x'"),
        ("--a 'b", "No closing quotation"),
        ("--direct_running_mode=multi_threading", "multi_threading and data_buffer_time_limit_ms lose rows"),
        ("--runner=FlinkRunner --experiments=data_buffer_time_limit_ms=5", "lose rows, by a race in Beam"),
        ("--runner=Nope", "--runner=Nope: Unexpected pipeline runner"),
        ("--runner=FlinkRunner", "add --temp_location"),
    ],
)
def test_wrong_options_are_one_line(beam_args, message):
    with pytest.raises(TfoptError, match=message) as caught:
        pipeline.run(summing(beam.Map(str)), beam_args)
    assert "\n" not in str(caught.value)


def test_options_of_other_runners_pass_through():
    parsed = pipeline.options("--runner=FlinkRunner --flink_master=host:8081 --of_flink=4")
    assert parsed.get_all_options(retain_unknown_options=True)["of_flink"] == "4"
