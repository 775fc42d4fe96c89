"""The lineage of artifacts, on a small MLMD that is written here as TFX writes its own."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys

import pytest

pytest.importorskip("ml_metadata", reason="make test-tfx runs it")

from ml_metadata.metadata_store import MetadataStore
from ml_metadata.proto import metadata_store_pb2 as mlmd

from tests.conftest import REPO
from tfopt.errors import TfoptError
from tfopt.tfx import lineage
from tfopt.tfx.last_run import last_run, summary

PIPELINE = "taxi"


class Recorder:
    """Writes executions as TFX does: one a component and run, with contexts for both."""

    def __init__(self, path):
        config = mlmd.ConnectionConfig()
        config.sqlite.filename_uri = str(path)
        self.store = MetadataStore(config)
        self.pipeline = self._context("pipeline", PIPELINE)
        self.run = 0

    def new_run(self, name, pipeline=None):
        owner = self.pipeline if pipeline is None else self._context("pipeline", pipeline)
        self.run = self._context("pipeline_run", name)
        self.store.put_parent_contexts([mlmd.ParentContext(child_id=self.run, parent_id=owner)])

    def artifact(self, kind, uri, **properties):
        type_id = self.store.put_artifact_type(mlmd.ArtifactType(name=kind))
        made = mlmd.Artifact(type_id=type_id, uri=uri, state=mlmd.Artifact.LIVE)
        for name, value in {"tfx_version": "1.21.0", **properties}.items():
            field = "int_value" if isinstance(value, int) else "string_value"
            setattr(made.custom_properties[name], field, value)
        return self.store.put_artifacts([made])[0]

    def execute(self, component, inputs, outputs, state="COMPLETE", **parameters):
        type_id = self.store.put_execution_type(mlmd.ExecutionType(name=f"some.module.{component}"))
        execution = mlmd.Execution(type_id=type_id, last_known_state=mlmd.Execution.State.Value(state))
        for name, value in parameters.items():
            execution.custom_properties[name].string_value = value
        (number,) = self.store.put_executions([execution])
        events = []
        for kind, artifacts in ((mlmd.Event.INPUT, inputs), (mlmd.Event.OUTPUT, outputs)):
            for name, artifact in artifacts:
                event = mlmd.Event(type=kind, execution_id=number, artifact_id=artifact)
                event.path.steps.add().key = name
                event.path.steps.add().index = 0
                events.append(event)
        self.store.put_events(events)
        contexts = [self.pipeline, self.run, self._context("node", f"{PIPELINE}.{component}")]
        links = [mlmd.Association(context_id=context, execution_id=number) for context in contexts]
        self.store.put_attributions_and_associations([], links)
        return number

    def _context(self, kind, name):
        type_id = self.store.put_context_type(mlmd.ContextType(name=kind))
        found = self.store.get_context_by_type_and_name(kind, name)
        return found.id if found else self.store.put_contexts([mlmd.Context(type_id=type_id, name=name)])[0]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """Two runs: the second takes everything but the last push from the cache. Ids are those in TREE."""
    path = tmp_path_factory.mktemp("mlmd") / "metadata.db"
    recorder = Recorder(path)
    recorder.new_run("2026-01-01")
    rows = recorder.artifact("Examples", "/root/CsvExampleGen/examples/1", split_names='[\n "train",\n "eval"]')
    gen = [("examples", rows)]
    recorder.execute("CsvExampleGen", [], gen, input_base="/data", input_config="{}")
    model = recorder.artifact("Model", "/root/Trainer/model/2")
    logs = recorder.artifact("ModelRun", "/root/Trainer/model_run/2")
    trained = [("model", model), ("model_run", logs)]
    recorder.execute("Trainer", gen, trained, train_args='{\n  "num_steps": 400\n}')
    blessing = recorder.artifact("ModelBlessing", "/root/Validator/blessing/3", blessed=1)
    recorder.execute("Validator", [*gen, *trained], [("blessing", blessing)])
    pushed = recorder.artifact("PushedModel", "/root/Pusher/pushed_model/4", pushed=1, pushed_destination="/serving/17")
    both = [("model", model), ("model_blessing", blessing)]
    recorder.execute("Pusher", both, [("pushed_model", pushed)])
    recorder.new_run("2026-01-02")
    recorder.execute("CsvExampleGen", [], gen, "CACHED", input_base="/data")
    recorder.execute("Trainer", gen, trained, "CACHED")
    again = recorder.artifact("PushedModel", "/root/Pusher/pushed_model/7", pushed=1, pushed_destination="/serving/18")
    recorder.execute("Pusher", both, [("pushed_model", again)])
    recorder.new_run("2026-01-03", "another")
    recorder.execute("CsvExampleGen", [], [], "FAILED")
    return path


TREE = """\
PushedModel 5  /root/Pusher/pushed_model/4
│    pushed = 1
│    pushed_destination = /serving/17
└─ Pusher, execution 4, COMPLETE
   ├─ model: Model 2  /root/Trainer/model/2
   │  └─ Trainer, execution 2, COMPLETE, cached in execution 6
   │     │    train_args = {"num_steps": 400}
   │     └─ examples: Examples 1  /root/CsvExampleGen/examples/1
   │        │    split_names = ["train", "eval"]
   │        └─ CsvExampleGen, execution 1, COMPLETE, cached in execution 5
   │                input_base = /data
   └─ model_blessing: ModelBlessing 4  /root/Validator/blessing/3
      │    blessed = 1
      └─ Validator, execution 3, COMPLETE
         ├─ examples: Examples 1 (see above)
         ├─ model: Model 2 (see above)
         └─ model_run: ModelRun 3  /root/Trainer/model_run/2
            └─ Trainer, execution 2 (see above)
"""


def test_the_tree_goes_back_to_the_examples(metadata):
    assert lineage.draw(lineage.trace(metadata, 5)) == TREE
    assert lineage.draw(lineage.trace(metadata, pushed="/serving/17/")) == TREE


@pytest.mark.parametrize("pushed", ["/serving/18", "/serving", "/serving/", None])
def test_a_folder_of_versions_means_the_latest(metadata, pushed):
    found = lineage.trace(metadata, pushed=pushed)
    assert found.roots == (6,)
    assert found.artifacts[6].producer == 7 and found.executions[7].state == "COMPLETE"
    assert sorted(found.executions) == [1, 2, 3, 5, 6, 7]  # the other push is not behind it


def test_upstream_only(metadata):
    found = lineage.trace(metadata, 2)
    assert sorted(found.artifacts) == [1, 2]


def test_last_run_of_a_pipeline(metadata):
    run = last_run(metadata, PIPELINE)
    assert [(each.component, each.state) for each in run.executions.values()] == [
        ("CsvExampleGen", "CACHED"),
        ("Trainer", "CACHED"),
        ("Pusher", "COMPLETE"),
    ]
    assert run.roots == (1, 2, 3, 6)
    (failed,) = last_run(metadata, "another").executions.values()
    assert failed.state == "FAILED"
    with pytest.raises(TfoptError, match="no run of a pipeline 'tax'"):
        last_run(metadata, "tax")


SUMMARY = """\
CsvExampleGen           ran 0.0 s       execution 1
Trainer                 ran 0.0 s       execution 2
Validator               ran 0.0 s       execution 3
Pusher                  ran 0.0 s       execution 4

Validator.blessing: NOT BLESSED
  serving: auc falls by 0.4
  int8: the error is 0.8

Pusher.pushed_model: nothing was pushed
"""


def test_summary_of_a_run(tmp_path):
    recorder = Recorder(tmp_path / "metadata.db")
    recorder.new_run("2026-01-01")
    model = [("model", recorder.artifact("Model", "/root/Trainer/model/2"))]
    recorder.execute("CsvExampleGen", [], [])
    recorder.execute("Trainer", [], model)
    reasons = "serving: auc falls by 0.4; int8: the error is 0.8"
    blessing = recorder.artifact("ModelBlessing", "/root/Validator/blessing/3", blessed=0, reasons=reasons)
    unused = recorder.artifact("ModelBlessing", "/root/Validator/tflite_blessing/3", blessed=0, reasons="no file")
    recorder.execute("Validator", model, [("blessing", blessing), ("tflite_blessing", unused)])
    pushed = recorder.artifact("PushedModel", "/root/Pusher/pushed_model/4", pushed=0)
    recorder.execute("Pusher", [*model, ("model_blessing", blessing)], [("pushed_model", pushed)])
    told = summary(last_run(tmp_path / "metadata.db", PIPELINE))
    assert re.sub(r"ran \d+\.\d s", "ran 0.0 s", told) == SUMMARY


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "pipelines.tfx_lineage", *flags], capture_output=True, text=True, cwd=REPO, timeout=120
    )


def test_command_prints_json_and_writes_nothing(metadata):
    before = metadata.read_bytes()
    done = command(f"--metadata={metadata}", "--artifact_id=5", "--format=json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["roots"] == [5]
    assert [each["id"] for each in told["artifacts"]] == [1, 2, 3, 4, 5]
    (trainer,) = [each for each in told["executions"] if each["component"] == "Trainer" and each["state"] == "COMPLETE"]
    assert trainer["inputs"] == [["examples", 1]] and trainer["outputs"] == [["model", 2], ["model_run", 3]]
    assert metadata.read_bytes() == before
    assert command(f"--metadata={metadata}", "--pushed=/serving/17").stdout == TREE


def other_database(path):
    with sqlite3.connect(path) as database:
        database.execute("create table t (a)")


def empty_mlmd(path):
    Recorder(path)


@pytest.mark.parametrize(
    "make, flags, message",
    [
        (None, [], "no such file"),
        (lambda path: path.mkdir(), [], "no such file"),
        (lambda path: path.write_text("text"), [], "not a database of ML Metadata: "),
        (other_database, [], "not a database of ML Metadata: "),
        (empty_mlmd, [], "holds no PushedModel; name an artifact by --artifact_id"),
        (empty_mlmd, ["--artifact_id=5"], "no artifact has the id 5"),
        (empty_mlmd, ["--pushed=/serving"], "no model was pushed to /serving; what was pushed last: nothing"),
        (empty_mlmd, ["--pushed=/serving", "--artifact_id=5"], "--pushed and --artifact_id: give one of them"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, make, flags, message):
    path = tmp_path / "metadata.db"
    if make is not None:
        make(path)
    before = path.read_bytes() if path.is_file() else None
    done = command(f"--metadata={path}", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert (path.read_bytes() if path.is_file() else None) == before
