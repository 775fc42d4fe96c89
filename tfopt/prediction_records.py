"""Predictions as records: one a row, a tf.Example of the outputs or a PredictionLog, and the files that hold them."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfopt import publish, request_log
from tfopt.data import Dataset
from tfopt.errors import TfoptError

EXAMPLE, PREDICTION_LOG = FORMATS = ("example", "prediction_log")


class Encoder(NamedTuple):
    """How the rows of a batch and what a signature answered become records.

    Attributes:
        format: EXAMPLE, a tf.Example with one feature an output, its values flat: floats are stored as float32,
            integers and booleans as int64; or PREDICTION_LOG, a tensorflow.serving.PredictionLog with the request of
            one row and its answer.
        signature: its name.
        outputs: those to keep; empty for all.
        keep: features of the input tf.Examples to copy into an EXAMPLE.
        model: the name that stands in a PREDICTION_LOG.
    """

    format: str
    signature: str
    outputs: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    model: str = "model"

    def records(self, batch: Dataset, outputs: Mapping[str, np.ndarray]) -> list[bytes]:
        """Returns a record for each row; the same rows give the same bytes."""
        rows = len(batch)
        chosen = {name: np.asarray(outputs[name]) for name in self.outputs or sorted(outputs)}
        for name, array in chosen.items():
            if not array.ndim or len(array) != rows:
                raise TfoptError(
                    f"output '{name}' of signature '{self.signature}' has shape {array.shape} for {rows} rows: only "
                    "what has a value for each row can be written; name others with --outputs"
                )
        encode = self._example if self.format == EXAMPLE else self._log
        return [encode(batch, row, chosen) for row in range(rows)]

    def _example(self, batch: Dataset, row: int, outputs: Mapping[str, np.ndarray]) -> bytes:
        import tensorflow as tf

        example = tf.train.Example()
        if self.keep and batch.records is not None:
            held = tf.train.Example.FromString(batch.records[row]).features.feature
            for name in self.keep:
                if name in held:
                    example.features.feature[name].CopyFrom(held[name])
        for name, array in outputs.items():
            example.features.feature[name].CopyFrom(_feature(name, array[row]))
        return bytes(example.SerializeToString(deterministic=True))

    def _log(self, batch: Dataset, row: int, outputs: Mapping[str, np.ndarray]) -> bytes:
        import tensorflow as tf

        log = request_log.protos("--format=prediction_log")[0]()
        for message in (log.predict_log.request, log.predict_log.response):
            message.model_spec.name = self.model
            message.model_spec.signature_name = self.signature
        for name, array in batch.inputs.items():
            one = array if name in batch.whole else array[row : row + 1]
            log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(one))
        for name, array in outputs.items():
            log.predict_log.response.outputs[name].CopyFrom(tf.make_tensor_proto(array[row : row + 1]))
        return bytes(log.SerializeToString(deterministic=True))


class Place(NamedTuple):
    """Where the files of a run end: PREFIX-00000-of-00004.tfrecord.gz and so on."""

    prefix: str
    shards: int

    def name(self, shard: int) -> str:
        """The path of a file."""
        return f"{self.prefix}-{shard:05}-of-{self.shards:05}.tfrecord.gz"

    @property
    def names(self) -> list[str]:
        """All paths."""
        return [self.name(shard) for shard in range(self.shards)]


def place(output: str, shards: int) -> Place:
    """Where --output=... means: DIR/predictions for a directory (it is there, or ends in /), or else a prefix."""
    if shards < 1 or shards > 99_999:
        raise TfoptError(f"--shards={shards}: wants 1 to 99999")
    directory = output.endswith("/") or Path(output).is_dir()
    return Place(f"{output.rstrip('/')}/predictions" if directory else output, shards)


def remove_stale(output: str) -> None:
    """Removes what killed runs left hidden at the place that --output=... means."""
    if "://" not in output:
        publish.remove_stale(Path(place(output, 1).prefix))


def write(where: Place, overwrite: bool, fill: Callable[[Sequence[str]], Any]) -> Any:
    """Has local files written, all or none.

    Args:
        where: they end there.
        overwrite: whether those of an earlier run are replaced, all of them.
        fill: writes to these paths, one a shard; they are moved when it returns.

    Returns:
        What `fill` returns.

    Raises:
        TfoptError: there are files of an earlier run and `overwrite` is not set, or the place cannot be written.
    """
    prefix = Path(where.prefix)
    earlier = set(prefix.parent.glob(f"{glob.escape(prefix.name)}-[0-9]*-of-[0-9]*.tfrecord.gz"))
    if earlier and not overwrite:
        raise TfoptError(f"--output: {min(earlier)} is there already; pass --overwrite to replace it")
    with publish.Workspace(prefix, [], overwrite=True, flag="--output") as work:
        names = [Path(name).name for name in where.names]
        result = fill([str(work.path(name)) for name in names])
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            for path in earlier - {prefix.parent / name for name in names}:
                path.unlink()
            for name in names:
                work.path(name).replace(prefix.parent / name)
        except OSError as error:
            raise TfoptError(f"--output={where.prefix}: cannot be written: {error.strerror}") from error
        return result


def write_file(path: str, records: Iterable[bytes]) -> None:
    """Writes a gzipped TFRecord file, by rename, so that a run that writes it twice leaves one whole file."""
    import tensorflow as tf

    partial = f"{path}.{os.getpid()}"
    with tf.io.TFRecordWriter(partial, "GZIP") as writer:
        for record in records:
            writer.write(record)
    Path(partial).replace(path)


def check(encoder: Encoder, outputs: Iterable[str], held: Iterable[str] | None) -> None:
    """Raises where outputs or features to keep are not there, or what a format needs.

    Args:
        encoder: what was asked for.
        outputs: of the signature.
        held: the features of the first tf.Example; None where the rows are none.
    """
    if encoder.format == PREDICTION_LOG:
        request_log.protos("--format=prediction_log")
    have = sorted(outputs)
    for name in encoder.outputs:
        if name not in have:
            raise TfoptError(f"--outputs: signature '{encoder.signature}' has no '{name}'; it has: {', '.join(have)}")
    if not encoder.keep:
        return
    if encoder.format != EXAMPLE:
        raise TfoptError("--keep goes with --format=example: a PredictionLog holds the whole request")
    if held is None:
        raise TfoptError("--keep: copies features of tf.Examples, and --data holds none")
    features = sorted(held)
    for name in encoder.keep:
        if name not in features:
            raise TfoptError(f"--keep: the first record of --data has no '{name}'; it has: {', '.join(features)}")
        if name in (encoder.outputs or have):
            raise TfoptError(f"--keep: '{name}' is an output too; leave it out there, or here with --outputs")


def _feature(name: str, values: np.ndarray) -> Any:
    import tensorflow as tf

    flat = np.asarray(values).reshape(-1)
    if flat.dtype.kind in "OSU":
        strings: Iterator[bytes] = (v if isinstance(v, bytes) else str(v).encode() for v in flat.tolist())
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=strings))
    if flat.dtype.kind in "biu":
        return tf.train.Feature(int64_list=tf.train.Int64List(value=flat.astype(np.int64)))
    if flat.dtype.kind == "c":
        raise TfoptError(f"output '{name}' is complex, which no tf.Example holds: use --format=prediction_log")
    return tf.train.Feature(float_list=tf.train.FloatList(value=flat.astype(np.float32)))
