from __future__ import annotations

import os
from pathlib import Path

import pytest

from tfopt.errors import TfoptError
from tfopt.publish import Workspace

TARGETS = ["serving/2", "device", "report.json"]


def write(workspace: Workspace, text: str) -> None:
    workspace.path("serving/2").mkdir()
    (workspace.path("serving/2") / "saved_model.pb").write_text(text)
    workspace.write("report.json", text)


def files(root: Path) -> dict[str, str]:
    return {str(f.relative_to(root)): f.read_text() for f in root.rglob("*") if f.is_file()}


def test_everything_appears_at_the_end(tmp_path):
    output = tmp_path / "deep" / "out"
    with Workspace(output, TARGETS, overwrite=False) as workspace:
        write(workspace, "new")
        assert not output.exists()
        assert workspace.final(workspace.path("serving/2")) == output / "serving" / "2"
        workspace.publish()
    assert files(tmp_path) == {"deep/out/serving/2/saved_model.pb": "new", "deep/out/report.json": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(error, tmp_path):
    with pytest.raises(error), Workspace(tmp_path / "deep" / "out", TARGETS, overwrite=False) as workspace:
        write(workspace, "half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_existing_results_are_refused_or_replaced_and_others_stay(tmp_path):
    for path in ("serving/1/saved_model.pb", "serving/2/saved_model.pb", "device/int8.tflite", "notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("old")
    with pytest.raises(TfoptError, match=r"holds serving/2 already; pass --overwrite"):
        Workspace(tmp_path, TARGETS, overwrite=False)
    with Workspace(tmp_path, TARGETS, overwrite=True) as workspace:
        write(workspace, "new")
        assert (tmp_path / "serving/2/saved_model.pb").read_text() == "old"
        workspace.publish()
    assert files(tmp_path) == {
        "serving/1/saved_model.pb": "old",  # another version
        "serving/2/saved_model.pb": "new",
        "report.json": "new",
        "notes.txt": "old",
    }, "the device files of an earlier run must not stay beside a new model"
    assert [p.name for p in tmp_path.parent.iterdir() if p.name.startswith(f".{tmp_path.name}")] == []


def test_a_rejected_artifact_does_not_appear(tmp_path):
    with Workspace(tmp_path / "out", TARGETS, overwrite=False) as workspace:
        write(workspace, "new")
        (workspace.path("device")).mkdir()
        (workspace.path("device") / "a.tflite").write_text("a")
        workspace.discard(workspace.path("serving/2"))
        workspace.discard(workspace.path("device") / "a.tflite")
        workspace.discard("")
        workspace.publish()
    assert files(tmp_path) == {"out/report.json": "new"}
    assert not (tmp_path / "out" / "device").exists()


def test_leavings_of_killed_runs_are_removed_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path / ".out.tfopt-999999999-abc"
    alive = tmp_path / f".out.tfopt-{os.getpid()}-abc"
    other = tmp_path / ".other.tfopt-999999999-abc"
    for path in (dead, alive, other):
        path.mkdir()
    with Workspace(tmp_path / "out", TARGETS, overwrite=False):
        assert not dead.exists() and alive.exists() and other.exists()


def test_places_that_cannot_hold_results(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TfoptError, match="is a file; name a directory"):
        Workspace(tmp_path / "file", TARGETS, overwrite=False)
    with pytest.raises(TfoptError, match=r"--output_dir=.*cannot be written"):
        Workspace(tmp_path / "file" / "below", TARGETS, overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
