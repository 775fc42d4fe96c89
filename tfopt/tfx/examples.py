"""Examples artifacts as data sources of tfopt: the TFRecord files of a split, of all spans."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence

from tfx.dsl.io import fileio
from tfx.types.artifact import Artifact

from tfopt.errors import TfoptError
from tfopt.readers import tf_records
from tfopt.tfx.artifacts import folders

_PAYLOAD = "FORMAT_TF_EXAMPLE"
_FILES = ("tfrecords_gzip", "FORMAT_TFRECORDS_GZIP", "tfrecords")


def source(artifacts: Sequence[Artifact], split: str) -> str:
    """Returns the source of the rows of a split, for `tfopt.data.load`.

    Args:
      artifacts: Examples, one a span; files may be gzipped or not.
      split: its name.

    Returns:
      Globs, joined by commas.

    Raises:
      TfoptError: an artifact has no such split, or its records are no tf.Examples in TFRecord files.
    """
    return ",".join(_glob(artifact, split) for artifact in artifacts)


def sample(globs: str, rows: int, folder: str) -> tuple[str, int]:
    """Writes the first rows of every span to one file: a train split may be larger than memory.

    Args:
      globs: what `source` gave.
      rows: in all; as many of each span, rounded up.
      folder: where the file goes.

    Returns:
      Its path, and how many rows it has.
    """
    import tensorflow as tf

    if rows < 1:
        raise TfoptError(f"representative_rows: wants 1 or more, received {rows}")
    spans = globs.split(",")
    records = [record for glob in spans for record in tf_records(glob, -(-rows // len(spans)))]
    path = posixpath.join(folder, "representative.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    return path, len(records)


def _glob(artifact: Artifact, split: str) -> str:
    _check_format(artifact)
    uri = artifact.uri.rstrip("/")
    if artifact.has_custom_property("custom_split_pattern"):
        patterns = json.loads(artifact.get_string_custom_property("custom_split_pattern"))
        if split in patterns:
            return posixpath.join(uri, patterns[split])
    for folder in (f"Split-{split}", split):  # the second is TFX's before 0.29
        if fileio.isdir(posixpath.join(uri, folder)):
            return posixpath.join(uri, folder, "*")
    names = [name.removeprefix("Split-") for name in folders(uri)]
    raise TfoptError(f"{uri}: the examples have no split {split!r}; they have: {', '.join(names) or 'none'}")


def _check_format(artifact: Artifact) -> None:
    for name, known in (("payload_format", (_PAYLOAD,)), ("file_format", _FILES)):
        if not artifact.has_custom_property(name):
            continue
        given = artifact.get_string_custom_property(name)
        if given and given not in known:
            raise TfoptError(
                f"{artifact.uri}: {name} of the examples is {given}; tfopt reads {' or '.join(known)}: "
                "convert them, or give the rows by the option representative_data or eval_data"
            )
