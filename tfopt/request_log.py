"""Logged requests as rows: TFRecords of tensorflow.serving.PredictionLog, as TensorFlow Serving writes them, or of
PredictRequest.

A request holds one row or many. Predict requests name tensors by input; Classify and Regress requests hold tf.Examples,
for a signature whose one input takes these serialized. The answers in a log are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfopt import examples
from tfopt.data import TensorSpec, whole_inputs
from tfopt.errors import TfoptError

_METHODS = {"predict_log": "Predict", "classify_log": "Classify", "regress_log": "Regress"}
DEFAULT = "serving_default"  # what a request means that names no signature


def request(record: bytes) -> tuple[str, Any] | None:
    """Returns the method and the message of a PredictionLog or PredictRequest; None for every other record.

    A tf.Example is neither.
    """
    from google.protobuf.message import DecodeError

    log, kind = _log(record)
    if kind in _METHODS and getattr(log, kind).request.ByteSize():
        return _METHODS[kind], getattr(log, kind).request
    try:
        message = protos("logged requests")[1].FromString(record)
        if message.inputs and all(tensor.dtype for tensor in message.inputs.values()):
            return "Predict", message
    except DecodeError:
        pass
    return None


def is_logged(record: bytes) -> bool:
    """Whether a record is one of a request log; a tf.Example, which has field 1 only, needs no protos to tell."""
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    try:
        if {field.field_number for field in UnknownFieldSet(Empty.FromString(record))} <= {1}:
            return False
    except DecodeError:
        return False
    return _log(record)[1] is not None or request(record) is not None


def protos(what: str) -> tuple[Any, Any]:
    """Returns the classes PredictionLog and PredictRequest.

    Args:
        what: needs them.

    Raises:
        TfoptError: the package that holds them, which an extra brings, is missing.
    """
    try:
        from tensorflow_serving.apis.predict_pb2 import PredictRequest
        from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
    except ImportError as error:
        raise TfoptError(f"{what}: needs tensorflow-serving-api: pip install 'tfopt[serving]'") from error
    return PredictionLog, PredictRequest


@dataclass(frozen=True)
class LogFormat:
    """How logged requests become arrays (see `readers.ExampleFormat`, which has the same face).

    Attributes:
        specs: the inputs of the signature.
        signature: its name; None takes every request that names these inputs.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    signature: str | None
    one_row_a_record = False

    def rows(self, records: Iterable[bytes], left_out: Counter[str] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yields the rows of the requests for the signature, as arrays of one row by input.

        Args:
            records: of one file or several.
            left_out: counts, by why, the requests that are left out.

        Raises:
            TfoptError: a record is no request, or its tensors cannot be read.
        """
        for record in records:
            why, arrays = self._inputs(record)
            if why is not None:
                if left_out is not None:
                    left_out[why] += 1
                continue
            whole = whole_inputs(self.specs)
            counts = {name: len(a) if a.ndim else None for name, a in arrays.items() if name not in whole}
            if len(set(counts.values())) > 1 or None in counts.values():
                raise TfoptError(f"{self.source}: a request has inputs of different numbers of rows: {counts}")
            for row in range(next(iter(counts.values()), 1) or 0):
                yield {name: a if name in whole else a[row : row + 1] for name, a in arrays.items()}

    def arrays(self, rows: Sequence[dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], None]:
        """Joins rows, of one request or several; a log has no labels."""
        joined = {}
        for name in self.specs:
            parts = [row[name] for row in rows]
            if name in whole_inputs(self.specs):
                if any(not np.array_equal(parts[0], part) for part in parts):
                    raise TfoptError(
                        f"{self.source}: input '{name}' has no row axis, and the requests give it different values: "
                        "they cannot share a batch"
                    )
                joined[name] = parts[0]
            elif len({part.shape for part in parts}) > 1:
                shapes = sorted({part.shape[1:] for part in parts})[:4]
                received = ", ".join(map(str, shapes))
                raise TfoptError(f"{self.source}: input '{name}': wants rows of one shape, received {received}")
            else:
                joined[name] = np.concatenate(parts)
        return joined, None

    def _inputs(self, record: bytes) -> tuple[str | None, dict[str, np.ndarray]]:
        """Why a request is left out, or None, and its arrays."""
        import tensorflow as tf

        found = request(record)
        if found is None:
            if (kind := _log(record)[1]) is not None:
                return f"of kind {kind}", {}
            raise TfoptError(f"{self.source}: a record is neither a PredictionLog nor a PredictRequest")
        method, message = found
        signature = message.model_spec.signature_name or DEFAULT
        if self.signature not in (None, signature):
            return f"for signature '{signature}'", {}
        if method != "Predict":
            name = examples.serialized_input(self.specs)
            if name is None:
                return f"{method}, whose tf.Examples the signature does not take", {}
            return None, {name: np.array([*_examples(message.input), None], dtype=object)[:-1]}
        if message.inputs.keys() != self.specs.keys():
            named = ", ".join(f"'{name}'" for name in sorted(message.inputs))
            if self.signature is None:
                return f"with the inputs {named}", {}
            raise TfoptError(
                f"{self.source}: a request for signature '{signature}' names the inputs {named}; "
                f"it takes {', '.join(map(str, self.specs.values()))}"
            )
        try:
            return None, {name: np.asarray(tf.make_ndarray(tensor)) for name, tensor in message.inputs.items()}
        except (ValueError, TypeError) as error:
            raise TfoptError(
                f"{self.source}: a request holds a tensor that cannot be read: {examples.one_line(error)}"
            ) from error


def left_out_text(source: str, left_out: Mapping[str, int]) -> tuple[str, ...]:
    """What a reader of the report should know about the requests that were left out."""
    return tuple(f"{source}: {n} requests {why} were left out" for why, n in sorted(left_out.items()))


def _log(record: bytes) -> tuple[Any, str | None]:
    """A record as a PredictionLog, and the kind of log that it holds; None where it is none."""
    from google.protobuf.message import DecodeError

    try:
        log = protos("logged requests")[0].FromString(record)
    except DecodeError:
        return None, None
    return log, log.WhichOneof("log_type")


def _examples(message: Any) -> Iterator[bytes]:
    """The serialized tf.Examples of a Classify or Regress request, each with the features that all share."""
    import tensorflow as tf

    for example in message.example_list.examples:
        yield example.SerializeToString()
    for example in message.example_list_with_context.examples:
        both = tf.train.Example.FromString(message.example_list_with_context.context.SerializeToString())
        for name, feature in example.features.feature.items():
            both.features.feature[name].CopyFrom(feature)
        yield both.SerializeToString()
