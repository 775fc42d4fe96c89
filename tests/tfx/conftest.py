"""Fixtures of the TFX tests: a pipeline of a few components on SQLite MLMD, and what MLMD says about it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO

DIGITS = REPO / "saved_models" / "digits"
DIGITS_INPUT = ("image", (8, 8, 1))


@dataclasses.dataclass
class Local:
    """Runs pipelines in a folder, and reads their MLMD."""

    root: Path

    @property
    def config(self) -> Any:
        from tfx.orchestration import metadata

        return metadata.sqlite_metadata_connection_config(str(self.root / "metadata.db"))

    def run(self, *components: Any, beam_args: list[str] | None = None) -> None:
        """Runs the components, which are given in any order."""
        from tfx.orchestration import pipeline
        from tfx.orchestration.local.local_dag_runner import LocalDagRunner

        made = pipeline.Pipeline(
            pipeline_name="test",
            pipeline_root=str(self.root / "root"),
            components=list(components),
            enable_cache=True,
            metadata_connection_config=self.config,
            beam_pipeline_args=beam_args,
        )
        LocalDagRunner().run(made)

    def store(self) -> Any:
        from ml_metadata import MetadataStore

        return MetadataStore(self.config)

    def last(self, channel: Any) -> dict[str, Any]:
        """The properties, custom ones too, and the uri of the last artifact of a channel."""
        store = self.store()
        artifacts = [
            artifact
            for artifact in store.get_artifacts_by_type(channel.type.TYPE_NAME)
            if f"/{channel.producer_component_id}/{channel.output_key}/" in artifact.uri
        ]
        artifact = max(artifacts, key=lambda each: each.id)
        values = {**artifact.properties, **artifact.custom_properties}
        return {
            **{name: getattr(value, value.WhichOneof("value")) for name, value in values.items()},
            "uri": Path(artifact.uri),
        }

    def executions(self) -> dict[str, list[str]]:
        """Component -> the states of its executions, in order."""
        from ml_metadata.proto import metadata_store_pb2 as proto

        store, found = self.store(), {}
        for kind in store.get_execution_types():
            for execution in store.get_executions_by_type(kind.name):
                state = proto.Execution.State.Name(execution.last_known_state)
                found.setdefault(kind.name.rsplit(".", 1)[-1], []).append(state)
        return found

    def message(self, component: str) -> str:
        """What MLMD says about the last execution of a component that failed."""
        store = self.store()
        (kind,) = (kind for kind in store.get_execution_types() if kind.name.endswith(component))
        last = max(store.get_executions_by_type(kind.name), key=lambda each: each.id)
        return last.custom_properties["__execution_result__"].string_value


@pytest.fixture
def local(tmp_path) -> Local:
    return Local(tmp_path)


@pytest.fixture
def importer():
    """A function that imports a directory as an artifact: importer(path, type, id, **properties)."""
    from tfx.dsl.components.common.importer import Importer
    from tfx.types import standard_artifacts

    def make(path: Path, kind: str = "Model", name: str | None = None, **properties: Any) -> Any:
        node = Importer(str(path), getattr(standard_artifacts, kind), properties=properties or None)
        return node.with_id(name or f"import_{kind.lower()}").outputs["result"]

    return make


@pytest.fixture(scope="session")
def digits_optimized(tmp_path_factory) -> Path:
    """saved_models/digits optimized: serving/1, and device/ with float32.tflite and int8.tflite, int8 at its edges."""
    import numpy as np

    from tfopt.optimize import Options, optimize

    folder = tmp_path_factory.mktemp("digits_optimized")
    rows = np.random.default_rng(0).random((20, *DIGITS_INPUT[1])).astype(np.float32)
    np.savez(folder / "rows.npz", **{DIGITS_INPUT[0]: rows})
    chosen = Options(
        tflite=("float32", "int8"),
        io_type="int8",
        representative_data=str(folder / "rows.npz"),
        measure_latency=False,
    )
    optimize(DIGITS, folder / "made", chosen)
    return folder / "made"


@pytest.fixture(scope="session")
def digits_examples(tmp_path_factory) -> Path:
    """60 rows for saved_models/digits: `digit` is what it says of them; the splits train (40 rows) and eval (20)."""
    import numpy as np

    from tfopt import runtime

    folder = tmp_path_factory.mktemp("digits_examples")
    rows = np.random.default_rng(0).random((60, *DIGITS_INPUT[1])).astype(np.float32)
    with runtime.open(DIGITS) as program:
        (scores,) = program.run("serving_default", {DIGITS_INPUT[0]: rows}).values()
    made = [{DIGITS_INPUT[0]: r.ravel(), "digit": [int(s.argmax())]} for r, s in zip(rows, scores, strict=True)]
    write_examples(folder, {"train": made[:40], "eval": made[40:]}, gzip=False)
    return folder


def write_examples(folder: Path, splits: dict[str, list[dict[str, Any]]], gzip: bool = True) -> None:
    """Writes rows of {feature: values} as ExampleGen does: `Split-<name>/data_tfrecord-00000-of-00001[.gz]`."""
    import tensorflow as tf

    def feature(values: Any) -> Any:
        if isinstance(values[0], bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    for split, rows in splits.items():
        path = folder / f"Split-{split}" / f"data_tfrecord-00000-of-00001{'.gz' if gzip else ''}"
        path.parent.mkdir(parents=True)
        with tf.io.TFRecordWriter(str(path), "GZIP" if gzip else "") as writer:
            for row in rows:
                features = tf.train.Features(feature={name: feature(values) for name, values in row.items()})
                writer.write(tf.train.Example(features=features).SerializeToString())
