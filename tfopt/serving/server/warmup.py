"""Loading a version as TensorFlow Serving does: its recorded requests are answered before any client's."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from tfopt.serving.server.errors import ServingError, invalid
from tfopt.serving.server.examples import classify, multi_inference, regress
from tfopt.serving.server.predict import predict
from tfopt.serving.server.servable import LoadOptions, Servable, log

FILE = Path("assets.extra", "tf_serving_warmup_requests")
_CONFIG = Path("assets.extra", "saved_model_config.pb")
_MOST = 1000

_ANSWER = {
    "predict_log": predict,
    "classify_log": classify,
    "regress_log": regress,
    "multi_inference_log": multi_inference,
}


def load(name: str, version: int, path: Path, options: LoadOptions) -> Servable:
    """A servable that has answered its warmup requests, where it has some.

    Raises:
      ServingError, tf.errors.OpError, or whatever else TensorFlow's loader may raise: it cannot be served.
    """
    if (path / _CONFIG).is_file():
        log.warning(
            "%s, version %d: %s is not applied here: its overrides are of TensorFlow Serving's own graph rewriters",
            name,
            version,
            _CONFIG,
        )
    servable = Servable(name, version, path, options)
    if options.warmup and (path / FILE).is_file():
        try:
            _replay(servable, path / FILE)
        except BaseException:
            servable.close()
            raise
    return servable


def _replay(servable: Servable, file: Path) -> None:
    begin = time.perf_counter()
    count = 0
    records = tf.compat.v1.io.tf_record_iterator(str(file))
    for record in itertools.islice(records, _MOST + 1):
        count += 1
        if count > _MOST:
            raise invalid(f"Number of warmup records exceeds the maximum ({_MOST}) at {file}")
        _answer(servable, prediction_log_pb2.PredictionLog.FromString(record), f"warmup request {count} of {file}")
    seconds = time.perf_counter() - begin
    log.info("%s, version %d: %d warmup requests in %.2f s", servable.name, servable.version, count, seconds)


def _answer(servable: Servable, record: Any, what: str) -> None:
    kind = record.WhichOneof("log_type")
    if kind not in _ANSWER:
        raise invalid(f"{what}: Unsupported log_type for warmup: {kind}")
    try:
        _ANSWER[kind](servable, getattr(record, kind).request)
    except ServingError as error:
        raise ServingError(error.code, f"{what}: {error.message}") from error
