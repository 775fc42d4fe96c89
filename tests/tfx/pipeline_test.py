"""The pipeline of pipelines/tfx_pipeline.py on the taxi trips, run as its users do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tests.conftest import REPO, serve_v1
from tfopt.tfx import last_run, lineage

STOCK = ["CsvExampleGen", "StatisticsGen", "SchemaGen", "Trainer"]
COMPONENTS = [*STOCK, "Optimizer", "OptimizationValidator", "DevicePusher", "Pusher"]


@dataclasses.dataclass
class Run:
    """One run of the script: its exit code, what it printed, and what MLMD has of it."""

    root: Path
    code: int
    stdout: str
    stderr: str

    def __post_init__(self):
        self.record = last_run.last_run(self.root / "metadata.db", "taxi")
        self.states = {each.component: each.state for each in self.record.executions.values()}

    def properties(self, kind):
        """Output -> the properties of its artifact."""
        return {name: each.properties for name, each in last_run.outputs(self.record, kind).items()}

    def place(self, output):
        """Where the artifact of an output is."""
        found = {**last_run.outputs(self.record, "Model"), **last_run.outputs(self.record, "Examples")}
        return found[output].uri

    def versions(self):
        """What lies where models are pushed to."""
        return {
            name: sorted(path.name for path in (self.root / name).glob("*") if path.is_dir())
            for name in ("serving", "device")
        }


def script(root: Path, data: Path, *flags: str) -> subprocess.CompletedProcess:
    places = {"data_root": data, "metadata": root / "metadata.db", "pipeline_root": root / "root"}
    places |= {"serving_dir": root / "serving", "device_dir": root / "device"}
    command = [sys.executable, "-m", "pipelines.tfx_pipeline", *(f"--{k}={v}" for k, v in places.items()), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=900)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("taxi")


@pytest.fixture(scope="module")
def run(root, shared):
    def start(*flags: str) -> Run:
        done = script(root, shared / "data" / "chicago-taxi", "--nomeasure_latency", "--train_steps=200", *flags)
        return Run(root, done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope="module")
def first(run):
    return run()


@pytest.fixture(scope="module")
def again(first, run):
    return run()


@pytest.fixture(scope="module")
def high_bar(again, run):
    """Better than the original by 1 in AUC: no model can be."""
    return run("--max_accuracy_drop=-1")


@pytest.fixture(scope="module")
def broken(high_bar, run):
    """All kernels but a hundredth are zeros, and nothing is trained to make up for them."""
    prune = {"pass": "prune_magnitude", "sparsity": 0.99, "epochs": 0, "min_steps": 0}
    lookups = {"pass": "client_lookups", "inputs": "*"}
    recipe = ["prune_graph", "fold_constants", "fold_affine", prune, "compact_signature", lookups, "prune_graph"]
    return run("--verify=off", f"--recipe={json.dumps(recipe)}")


pytestmark = pytest.mark.slow


def test_runs_and_pushes(first):
    assert first.code == 0, first.stderr
    assert first.states == dict.fromkeys(COMPONENTS, "COMPLETE")
    blessings = first.properties("ModelBlessing")
    serving, tflite = (blessings[f"OptimizationValidator.{name}"] for name in ("blessing", "tflite_blessing"))
    assert serving["blessed"] == tflite["blessed"] == 1
    assert serving["original_auc"] > 0.92
    assert serving["serving_auc"] == pytest.approx(serving["original_auc"], abs=1e-5)
    assert serving["serving_max_error"] < 1e-4
    assert tflite["dynamic_int8_auc"] == pytest.approx(serving["original_auc"], abs=0.01)
    (report,) = first.properties("OptimizationReport").values()
    assert report["optimized_bytes"] < report["original_bytes"] * 0.6
    assert report["samples"] == serving["samples"] > 4_000
    versions = first.versions()
    assert [len(each) for each in versions.values()] == [1, 1]
    for name, artifact in first.properties("PushedModel").items():
        folder = "device" if name.startswith("Device") else "serving"
        assert artifact["pushed_destination"] == str(first.root / folder / versions[folder][0])
        assert f"{name}: {artifact['pushed_destination']}" in first.stdout


def test_pushed_models_answer(first):
    """As the trained model does: on tf.Examples, and the TFLite file on what its client makes of their features."""
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    versions = first.versions()
    serving, device = (first.root / name / versions[name][0] for name in ("serving", "device"))
    files = tf.io.gfile.glob(first.place("CsvExampleGen.examples") + "/Split-eval/*")
    records = tf.data.TFRecordDataset(files, "GZIP").take(50)
    records = np.array(list(records.as_numpy_iterator()), dtype=object)
    expected = serve_v1(first.place("Trainer.model") + "/Format-Serving", {"examples": records})["probability"]
    assert np.abs(serve_v1(serving, {"examples": records})["probability"] - expected).max() < 1e-5
    inputs = client_of(device).inputs([features(record) for record in records])
    runner = Interpreter(str(device / "dynamic_int8.tflite")).get_signature_runner()
    given = np.concatenate(
        [runner(**{name: value[i : i + 1] for name, value in inputs.items()})["probability"] for i in range(50)]
    )
    assert np.abs(given - expected).max() < 0.1


def client_of(model: Path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("taxi_client", model / "assets.extra" / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(record: bytes) -> dict:
    """A tf.Example as a client has it: what is missing is not there."""
    import tensorflow as tf

    found = {}
    for name, feature in tf.train.Example.FromString(record).features.feature.items():
        values = getattr(feature, feature.WhichOneof("kind")).value if feature.WhichOneof("kind") else []
        if values:
            found[name] = values[0]
    return found


@pytest.mark.parametrize("component", COMPONENTS)
def test_second_run_takes_everything_from_the_cache(first, again, component):
    assert again.code == 0, again.stderr
    assert again.states[component] == "CACHED"
    assert f"{component:<24}from the cache" in again.stdout
    assert again.versions() == first.versions()


def test_lineage_goes_back_to_the_examples(again):
    metadata = again.root / "metadata.db"
    found = lineage.trace(metadata, pushed=str(again.root / "serving"))
    made = {each.component: each for each in found.executions.values() if each.state == "COMPLETE"}
    assert sorted(made) == sorted(set(COMPONENTS) - {"DevicePusher"})
    assert made["CsvExampleGen"].inputs == ()
    assert all(each.cached for each in made.values())
    text = lineage.draw(found)
    assert text.splitlines()[0].startswith("PushedModel ")
    for name in ("Optimizer, execution ", "Trainer, execution ", "Schema ", "ExampleStatistics ", "input_base = "):
        assert name in text
    command = [sys.executable, "-m", "pipelines.tfx_lineage", f"--metadata={metadata}"]
    both = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120).stdout
    assert both.count("\nPushedModel ") + both.startswith("PushedModel ") == 2
    assert "DevicePusher, execution " in both


@pytest.mark.parametrize("fixture, reason", [("high_bar", "max_accuracy_drop=-1"), ("broken", "auc falls by ")])
def test_a_model_below_its_bar_is_not_pushed(first, request, fixture, reason):
    run = request.getfixturevalue(fixture)
    assert run.code == 1, run.stderr
    again = [*STOCK, "Optimizer"] if fixture == "high_bar" else STOCK
    assert run.states == {name: "CACHED" if name in again else "COMPLETE" for name in COMPONENTS}
    for blessing in run.properties("ModelBlessing").values():
        assert blessing["blessed"] == 0
        assert reason in blessing["reasons"]
        assert blessing["reasons"].split("; ")[0] in run.stdout
    for name, pushed in run.properties("PushedModel").items():
        assert pushed["pushed"] == 0
        assert f"{name}: nothing was pushed" in run.stdout
    assert run.versions() == first.versions()


def test_the_reason_is_found_from_what_was_not_pushed(broken):
    metadata = broken.root / "metadata.db"
    text = lineage.draw(lineage.trace(metadata))
    assert text.count("reasons = ") == 2 and "auc falls by " in text
    assert lineage.trace(metadata, pushed=str(broken.root / "serving")).artifacts  # the last one that was


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data_root=/nowhere"], "--data_root=/nowhere: no .csv file in this folder"),
        (["--module_file=/nowhere.py"], "--module_file=/nowhere.py: no such file"),
        (["--device_dir="], "give --device_dir"),
        (["--compile_to=p.yaml"], "the name must end in .json"),
        (["--compile_to=p.json"], "--compile_to needs --image"),
        (["--metadata="], "give --metadata"),
    ],
)
def test_bad_usage_ends_in_one_line(tmp_path, flags, message):
    (tmp_path / "rows.csv").write_text("fare,tips\n1.0,2.0\n")
    done = script(tmp_path, tmp_path, *flags)
    assert done.returncode == 2
    line = [line for line in done.stderr.splitlines() if not line.startswith(("WARNING", "I0000", "W0000"))][-1]
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_component_that_fails_is_named(tmp_path):
    """In one line, though Beam raises with the stack trace of a worker."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("fare,tips\n1.0,2.0\n3.0,4.0,5.0\n")
    done = script(tmp_path, tmp_path / "data")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: CsvExampleGen failed: Columns do not match specified csv headers")
    assert not list((tmp_path / "root" / "CsvExampleGen" / "examples").glob("*"))
