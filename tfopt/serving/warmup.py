"""Warmup requests: what TensorFlow Serving replays when it loads a model, so that no client's request is the first.

The file is `<version>/assets.extra/tf_serving_warmup_requests`, a TFRecord of tensorflow.serving.PredictionLog, at most
1,000 of them. One that fails makes the model fail to load; so each is replayed in a fresh v1 session before it is
written. TensorFlow prepares a graph anew for every set of inputs and outputs, and allocates for every batch size: there
is one request for each signature and each allowed batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from tfopt.data import Dataset, load, whole_inputs
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.model import load as load_model
from tfopt.serving.lint.graph import assigned_state
from tfopt.serving.warmup_replay import CLASSIFY, REGRESS, Session, arrays, read, replay, server, target
from tfopt.verify import features, input_specs, inputs_for

FILE = Path("assets.extra", "tf_serving_warmup_requests")
MOST = 1000  # records; more are an error at load
_LARGEST = 1 << 30  # bytes of one request; a protobuf cannot hold more than 2 GiB

__all__ = ["FILE", "MOST", "Session", "Summary", "arrays", "make_log", "read", "replay", "server", "target", "write"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
      path: the file; None where no signature could be warmed up, and nothing was written.
      records, bytes: how many requests it holds, and its size.
      covered: signature -> the batch sizes of its requests; none where a request has no batch.
      skipped: signature -> why it has no request.
      source: where the inputs came from.
    """

    path: Path | None
    records: int
    bytes: int
    covered: dict[str, list[int]]
    skipped: dict[str, str]
    source: str

    def lines(self) -> list[str]:
        """For people."""
        found = [f"{self.records} warmup requests, {self.bytes:,} bytes, from {self.source}"] if self.path else []
        for name, sizes in self.covered.items():
            found.append(f"  {name}: {'batch ' + ', '.join(map(str, sizes)) if sizes else 'no batch'}")
        return found + [f"  {name}: no warmup: {why}" for name, why in self.skipped.items()]


def write(
    saved_model_dir: str | Path,
    batch_sizes: Sequence[int],
    data: str | None = None,
    signatures: Sequence[str] | None = None,
    *,
    model_name: str = "",
    seed: int = 0,
) -> Summary:
    """Writes the warmup requests of a model; an older file is replaced.

    Args:
      saved_model_dir: the version directory.
      batch_sizes: one request for each; the allowed ones, or those that clients send.
      data: a source of real rows (see `tfopt.data.load`) for the signatures that it fits; others, and all where None,
        get drawn inputs that the model accepts.
      signatures: which to warm up; None for all.
      model_name: what requests call the model; TensorFlow Serving does not look at it.
      seed: of drawn inputs.

    Returns:
      What was written, and what was left out, with the reason. Signatures that assign state are: the model would start
      from the state that the warmup left.

    Raises:
      TfoptError: the model or the data cannot be read, or there would be more than 1,000 requests.
    """
    directory = Path(saved_model_dir)
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise TfoptError(f"{directory}: batch sizes must be at least 1, received {list(batch_sizes)}")
    model = load_model(directory, list(signatures) if signatures else None)
    if len(sizes) * len(model.signatures) > MOST:
        raise TfoptError(
            f"{directory}: {len(model.signatures)} signatures at {len(sizes)} batch sizes are more than the {MOST} "
            "warmup requests that TensorFlow Serving takes; give fewer batch sizes or signatures"
        )
    state = assigned_state(model)
    logs: list[PredictionLog] = []
    covered: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    sources: list[str] = []
    misfits: list[TfoptError] = []
    with Session(directory) as session:
        for name in model.signatures:
            if name in state:
                skipped[name] = f"it assigns {state[name]}: the server would start from what the warmup left there"
                continue
            composite = [key for key, info in model.signatures[name].inputs.items() if not info.name]
            if composite:
                skipped[name] = f"TensorFlow Serving cannot be sent the sparse or ragged input {composite[0]!r}"
                continue
            try:
                rows = _rows(model, name, data, max(sizes), seed, session, misfits)
            except TfoptError as error:
                skipped[name] = str(error).removeprefix(f"{directory}: ")
                continue
            covered[name] = []
            for size, inputs in _batches(model, name, rows, sizes):
                logs.append(make_log(name, model.signatures[name], inputs, model_name))
                covered[name] += [size] if size else []
            sources.append(rows.source)
    if misfits and len(misfits) == len(model.signatures) - len(state):
        raise misfits[0]
    path = directory / FILE
    if logs:
        largest = max(log.ByteSize() for log in logs)
        if largest > _LARGEST:
            raise TfoptError(f"{directory}: a warmup request takes {largest:,} bytes; give smaller batch sizes")
        with Session(directory) as session:
            for log in logs:
                session(log)
        path.parent.mkdir(exist_ok=True)
        with tf.io.TFRecordWriter(str(path)) as writer:
            for log in logs:
                writer.write(log.SerializeToString(deterministic=True))
    written = path.stat().st_size if logs else 0
    source = ", ".join(dict.fromkeys(sources))
    return Summary(path if logs else None, len(logs), written, covered, skipped, source)


def _rows(
    model: Model, name: str, data: str | None, most: int, seed: int, session: Session, misfits: list[TfoptError]
) -> Dataset:
    """Inputs that a signature accepts: real ones where they fit."""
    if data:
        try:
            return load(data, input_specs(model, name), feature_spec=features(model, name), limit=most)
        except TfoptError as error:
            misfits.append(error)
    alone = dataclasses.replace(model, signatures={name: model.signatures[name]})
    return inputs_for(alone, None, seed, session.call)[name]


def _batches(model: Model, name: str, rows: Dataset, sizes: Sequence[int]) -> Iterator[tuple[int | None, dict]]:
    """Inputs of every batch size, rows repeated as needed; of a signature without a batch, or a fixed one, its own."""
    specs = input_specs(model, name)
    batched = [key for key in specs if key not in whole_inputs(specs)]
    first = [shape[0] for key in batched if (shape := specs[key].shape)]
    fixed = {size for size in first if size is not None}
    if not batched:
        yield None, rows.inputs
        return
    for size in fixed or sizes:
        pick = np.arange(size) % len(rows)
        yield size, {key: array[pick] if key in batched else array for key, array in rows.inputs.items()}


def make_log(name: str, signature: SignatureDef, inputs: Mapping[str, np.ndarray], model_name: str = "") -> Any:
    """A PredictionLog that holds one request of a signature: Predict, or Classify or Regress where it can answer them.

    Predict is answered whatever the method is; the other two send serialized tf.Examples to the one input.
    """
    log = PredictionLog()
    takes_examples = [info.dtype for info in signature.inputs.values()] == [tf.string.as_datatype_enum]
    kind = {CLASSIFY: "classify", REGRESS: "regress"}.get(signature.method_name if takes_examples else "", "predict")
    request = getattr(log, f"{kind}_log").request
    request.model_spec.name, request.model_spec.signature_name = model_name, name
    if kind == "predict":
        for key, array in inputs.items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(array, signature.inputs[key].dtype))
    else:
        ((_, examples),) = inputs.items()
        for text in np.ravel(examples):
            request.input.example_list.examples.add().MergeFromString(text)
    return log
