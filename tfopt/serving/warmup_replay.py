"""Replaying warmup requests: in a v1 session as TensorFlow Serving does when it loads a model, or at a server."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from tfopt.errors import TfoptError
from tfopt.inline import tensor_names
from tfopt.measure import peak_memory_bytes
from tfopt.runtime import one_line

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


class Session:
    """A SavedModel in a fresh v1 session, as TensorFlow Serving has it; a context manager."""

    def __init__(self, directory: str | Path, config: Any = None):
        """Loads the model.

        Args:
          directory: a version directory.
          config: a ConfigProto.

        Raises:
          TfoptError: it does not load.
        """
        self._graph = tf.Graph()
        self._session: Any = tf.compat.v1.Session(graph=self._graph, config=config)
        level = tf.get_logger().level
        tf.get_logger().setLevel("ERROR")  # the loader's own deprecation
        try:
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(directory))
        except Exception as error:  # whatever the loader stumbles over
            self._session.close()
            raise TfoptError(f"{directory}: does not load in a v1 session: {one_line(error)}") from error
        finally:
            tf.get_logger().setLevel(level)
        self.directory = directory
        self.signatures: dict[str, SignatureDef] = {
            k: s for k, s in sorted(meta.signature_def.items()) if not k.startswith("__saved_model_")
        }

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def call(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature; components of sparse inputs and outputs are called `name:component`.

        Raises:
          TfoptError: it cannot run.
        """
        signature = self.signatures[name]
        try:
            feeds = {tensor: inputs[key] for key, tensor in _tensors(signature.inputs).items()}
            return self._session.run(_tensors(signature.outputs), feeds)
        except (tf.errors.OpError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise TfoptError(f"{self.directory}: signature {name!r} cannot run: {one_line(error)}") from error

    def __call__(self, log: PredictionLog) -> dict[str, np.ndarray]:
        """Answers a request as TensorFlow Serving would.

        Raises:
          TfoptError: it would refuse the request.
        """
        kind, name = target(log)
        signature = self.signatures.get(name)
        if signature is None:
            raise TfoptError(f"there is no signature {name!r}; there are {', '.join(map(repr, self.signatures))}")
        if kind == "predict":
            given = log.predict_log.request.inputs
            if given.keys() != signature.inputs.keys():
                raise TfoptError(f"signature {name!r} takes {sorted(signature.inputs)}, received {sorted(given)}")
            for key, tensor in given.items():
                if tensor.dtype != signature.inputs[key].dtype:
                    wanted, received = (tf.as_dtype(d).name for d in (signature.inputs[key].dtype, tensor.dtype))
                    raise TfoptError(f"input {key!r} of signature {name!r} is {wanted}, received {received}")
            return self.call(name, arrays(log))
        method = CLASSIFY if kind == "classify" else REGRESS
        if signature.method_name != method:
            raise TfoptError(f"signature {name!r} has method {signature.method_name!r}, and a {kind} request came")
        (key,) = signature.inputs
        return self.call(name, {key: arrays(log)["inputs"]})


def read(path: str | Path) -> Iterator[PredictionLog]:
    """The requests of a warmup file.

    Raises:
      TfoptError: it is no such file.
    """
    dataset = tf.data.TFRecordDataset(str(path))
    records = iter(dataset.as_numpy_iterator())
    for number in itertools.count():
        try:
            yield PredictionLog.FromString(next(records))
        except StopIteration:
            return
        except (DecodeError, tf.errors.OpError, struct.error) as error:
            raise TfoptError(f"{path}: record {number} cannot be read as a PredictionLog: {one_line(error)}") from error


def target(log: PredictionLog) -> tuple[str, str]:
    """What a request asks for: ("predict", "classify" or "regress", signature).

    Raises:
      TfoptError: a log that no warmup may hold.
    """
    kind = (log.WhichOneof("log_type") or "nothing").removesuffix("_log")
    if kind not in ("predict", "classify", "regress"):
        raise TfoptError(f"a warmup request must be Predict, Classify or Regress, found {kind}")
    return kind, getattr(log, f"{kind}_log").request.model_spec.signature_name or "serving_default"


def arrays(log: PredictionLog) -> dict[str, np.ndarray]:
    """What a request sends: arrays by input name; serialized examples as "inputs" where it is no Predict."""
    kind, _ = target(log)
    request = getattr(log, f"{kind}_log").request
    if kind == "predict":
        return {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
    form = request.input.WhichOneof("kind")
    if form is None:
        raise TfoptError("the request holds no examples")
    examples = [example.SerializeToString() for example in getattr(request.input, form).examples]
    if form == "example_list_with_context":
        # Features of the context come first, as in TensorFlow Serving: the example's own replace them.
        context = request.input.example_list_with_context.context.SerializeToString()
        examples = [context + example for example in examples]
    return {"inputs": np.array(examples, object)}


def replay(path: str | Path, run: Callable[[PredictionLog], object]) -> int:
    """Sends every request of a warmup file.

    Args:
      path: the file.
      run: answers one: a `Session`, or `server(...)`.

    Returns:
      How many there were.

    Raises:
      TfoptError: the first one that fails, with its number.
    """
    count = 0
    for log in read(path):
        try:
            run(log)
        except TfoptError as error:
            raise TfoptError(f"{path}: record {count}: {error}") from error
        count += 1
    return count


def server(address: str, model_name: str, timeout_s: float = 60.0) -> Callable[[PredictionLog], object]:
    """Answers requests by a server, ours or tensorflow_model_server.

    Args:
      address: "host:port" of its gRPC.
      model_name: the model.
      timeout_s: of one request, in seconds.
    """
    import grpc
    from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

    size = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    stub = PredictionServiceStub(grpc.insecure_channel(address, options=size))

    def run(log: PredictionLog) -> object:
        kind, name = target(log)
        request = getattr(log, f"{kind}_log").request
        request.model_spec.name = model_name
        try:
            return getattr(stub, kind.capitalize())(request, timeout=timeout_s)
        except grpc.RpcError as error:
            code, details = error.code().name, " ".join(error.details().split())
            raise TfoptError(f"{address}: {kind} of signature {name!r} failed: {code}: {details}") from error

    return run


def worker() -> Callable[[tuple[str, str]], int]:
    """A child process that replays (directory, warmup file), and returns its peak memory in bytes."""

    def answer(request: tuple[str, str]) -> int:
        with Session(request[0]) as session:
            replay(request[1], session)
        return peak_memory_bytes()

    return answer


def _tensors(infos: Mapping[str, Any]) -> dict[str, str]:
    return {f"{k}:{part}" if part else k: tensor for k, info in infos.items() for part, tensor in tensor_names(info)}
