from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tfx.types import standard_artifacts

from tests.tfx.conftest import DIGITS_INPUT
from tfopt.errors import TfoptError
from tfopt.tfx.device_pusher import DevicePusher, DevicePusherExecutor


@pytest.fixture
def files(digits_optimized) -> Path:
    return digits_optimized / "device"


def artifact(kind: str, uri: Path, **custom):
    from tfopt.tfx.artifacts import set_custom_properties

    made = getattr(standard_artifacts, kind)()
    made.uri = str(uri)
    set_custom_properties(made, custom)
    return made


def push(model, destination, tmp_path, blessing=None, version=0):
    """Runs the executor alone; returns the custom properties of the pushed model, and its directory."""
    from tfopt.tfx.artifacts import custom_properties

    pushed = artifact("PushedModel", tmp_path / f"pushed_model_{version}")
    inputs = {"tflite_model": [model], **({"blessing": [blessing]} if blessing else {})}
    parameters = {"push_destination": str(destination), "version": version}
    DevicePusherExecutor().Do(inputs, {"pushed_model": [pushed]}, parameters)
    return custom_properties(pushed), Path(pushed.uri)


def test_a_pipeline_pushes_the_files_with_their_manifest(files, local, importer):
    model = importer(files)
    pusher = DevicePusher(model, push_destination=str(local.root / "device"))
    local.run(model.producer_component, pusher)
    (version,) = (local.root / "device").iterdir()
    facts = local.last(pusher.outputs["pushed_model"])
    assert facts["pushed"] == 1 and facts["pushed_destination"] == str(version)
    assert facts["pushed_version"] == version.name and version.name.isdigit()
    assert {path.name for path in version.iterdir()} == {"float32.tflite", "int8.tflite", "manifest.json"}
    assert {path.name for path in facts["uri"].iterdir()} == {path.name for path in version.iterdir()}
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["version"] == version.name and manifest["source"]["uri"] == str(files)
    for each in manifest["files"]:
        data = (version / each["name"]).read_bytes()
        assert each["sha256"] == hashlib.sha256(data).hexdigest() and each["bytes"] == len(data)
    by_name = {each["name"]: each["signatures"]["serving_default"] for each in manifest["files"]}
    name, shape = DIGITS_INPUT
    assert by_name["float32.tflite"]["inputs"] == {name: {"dtype": "float32", "shape": [1, *shape]}}
    image = by_name["int8.tflite"]["inputs"][name]
    assert (
        image["dtype"] == "int8" and image["zero_point"] == -128 and image["scale"] == pytest.approx(1 / 255, rel=1e-2)
    )
    local.run(model.producer_component, pusher)
    assert local.executions()["DevicePusher"] == ["COMPLETE", "CACHED"]
    assert len(list((local.root / "device").iterdir())) == 1


def test_what_the_optimizer_knows_reaches_the_manifest(files, tmp_path):
    known = {"recipe": "mine", "tfopt_version": "9", "metric": "auc", "samples": 7, "int8_metric": 0.75}
    facts, _ = push(artifact("Model", files, **known), tmp_path / "out", tmp_path, version=3)
    manifest = json.loads((tmp_path / "out" / "3" / "manifest.json").read_text())
    assert facts["pushed_version"] == "3" and (manifest["recipe"], manifest["tfopt_version"]) == ("mine", "9")
    metrics = {each["name"]: each["metric"] for each in manifest["files"]}
    assert metrics == {"float32.tflite": None, "int8.tflite": {"name": "auc", "value": 0.75, "samples": 7}}
    assert all(each["minimum_runtime_version"] for each in manifest["files"])


def test_versions_stand_beside_each_other_and_are_never_written_over(files, tmp_path):
    model, out = artifact("Model", files), tmp_path / "out"
    versions = [push(model, out, tmp_path)[0]["pushed_version"] for _ in range(2)]
    assert len(set(versions)) == 2 and {path.name for path in out.iterdir()} == set(versions)
    with pytest.raises(TfoptError, match=f"holds version {versions[0]} already"):
        push(model, out, tmp_path, version=int(versions[0]))
    with pytest.raises(TfoptError, match="version must be a positive number, or 0"):
        push(model, out, tmp_path, version=-1)


@pytest.mark.parametrize(
    ("blessing", "reason"),
    [
        ({"blessed": 0, "reasons": "auc falls by 0.2"}, "the model is not blessed: auc falls by 0.2"),
        ({}, "the model is not blessed: its blessing does not say why"),
    ],
)
def test_what_is_not_blessed_is_not_pushed(blessing, reason, files, tmp_path):
    given = artifact("ModelBlessing", tmp_path, current_model=str(files), **blessing)
    facts, archive = push(artifact("Model", files), tmp_path / "out", tmp_path, given)
    assert facts == {"pushed": 0, "reason": reason}
    assert not (tmp_path / "out").exists() and not archive.exists()


def test_a_blessing_of_another_model_is_refused(files, tmp_path):
    given = artifact("ModelBlessing", tmp_path, current_model="/other", blessed=1)
    with pytest.raises(TfoptError, match=r"the blessing is of /other, .*tflite_blessing of OptimizationValidator"):
        push(artifact("Model", files), tmp_path / "out", tmp_path, given)
    right = artifact("ModelBlessing", tmp_path, current_model=str(files), blessed=1)
    assert push(artifact("Model", files), tmp_path / "out", tmp_path, right)[0]["pushed"] == 1


def test_no_files_are_a_reason_not_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    model = artifact("Model", tmp_path / "empty", rejected="int8: no TFLite kernel for Foo")
    facts, _ = push(model, tmp_path / "out", tmp_path)
    assert facts["pushed"] == 0 and facts["reason"].endswith("holds no .tflite file: int8: no TFLite kernel for Foo")


def test_nothing_half_written_is_left(files, tmp_path, monkeypatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.tflite").write_bytes(b"no flatbuffer")
    with pytest.raises(TfoptError, match=r"not a .tflite file"):
        push(artifact("Model", tmp_path / "bad"), tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TfoptError, match=r"push_destination=.*/file: cannot be written"):
        push(artifact("Model", files), tmp_path / "file", tmp_path)
    monkeypatch.setattr("tfopt.tfx.device_pusher.Path.rename", _full)
    with pytest.raises(TfoptError, match=r"cannot be written: .*No space left"):
        push(artifact("Model", files), tmp_path / "out", tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def _full(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_destination_is_asked_for(importer, files):
    with pytest.raises(TfoptError, match="push_destination is missing"):
        DevicePusher(importer(files))
