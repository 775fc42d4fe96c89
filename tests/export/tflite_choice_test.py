from __future__ import annotations

from pathlib import Path

import pytest

from tfopt.export.tflite_choice import Candidate, choose, grouped
from tfopt.export.tflite_kinds import Engine


def _candidates(folder: Path, static: bool, *each: tuple[float | None, int, bool]) -> list[Candidate]:
    found = []
    for number, (snr, size, floats) in enumerate(each):
        path = folder / str(number)
        path.write_bytes(bytes(size))
        facts = {"snr": snr, "static": static, "float_ops": {"SIN": 2} if floats else {}}
        found.append(Candidate(Engine(str(number), "convert"), path, facts))
    return found


@pytest.mark.parametrize(
    ("static", "each", "best"),
    [
        (False, [(29.0, 100, True), (31.0, 900, True)], 1),  # the closer one
        (False, [(30.1, 100, True), (31.0, 900, True)], 0),  # as close: the smaller one
        (False, [(30.8, 102, True), (31.0, 100, True)], 0),  # as close and as small: the first
        (True, [(48.0, 100, False), (50.0, 900, True)], 1),  # with a float op
        (False, [(None, 900, True), (None, 100, True)], 1),
        (True, [(float("inf"), 900, False), (60.0, 100, False)], 0),
        (False, [(77.0, 900, True), (70.0, 100, True)], 1),  # both beyond what shows: the smaller one
    ],
)
def test_the_best_is_kept(tmp_path, static, each, best):
    found = _candidates(tmp_path, static, *each)
    assert choose(found) is found[best]


def test_a_much_slower_file_is_not_kept(tmp_path):
    found = _candidates(tmp_path, False, (73.0, 100, True), (65.0, 110, True), (50.0, 90, True))
    for each, seconds in zip(found, (0.33, 0.02, 0.01), strict=True):
        each.facts["seconds"] = seconds
    assert choose(found) is found[1]  # the third is faster still, and too far off


def test_what_keeps_the_zeros_and_clusters_is_kept_unless_it_is_far_off(tmp_path):
    found = _candidates(tmp_path, True, (40.0, 100, False), (30.0, 110, False), (29.5, 90, False))
    for each, lost in zip(found, (["clusters"], [], []), strict=True):
        each.facts["loses"] = lost
    assert choose(found) is found[1]  # their gzip bytes differ less than their bytes
    found[1].facts["snr"] = found[2].facts["snr"] = 27.0
    assert choose(found) is found[0]
    assert str(found[0]).endswith("without the model's clusters")


def test_candidates_in_words(tmp_path):
    found = _candidates(tmp_path, True, (31.04, 1234, True), (float("inf"), 5, False))
    assert [str(each) for each in found] == ["31.0 dB in 1,234 bytes with 2 float ops", "no error in 5 bytes"]


def test_a_reason_is_said_once():
    assert grouped({"a": "it died", "b": "it hung", "c": "it died"}, ": ") == "a and c: it died; b: it hung"
