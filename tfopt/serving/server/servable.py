"""One version of a model, loaded into a v1 session, which is how TensorFlow Serving runs a SavedModel."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from tfopt.errors import one_line
from tfopt.inline import tensor_names
from tfopt.serving import batching_parameters
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.server import metrics
from tfopt.serving.server.batching import Batched, batch, obstacle
from tfopt.serving.server.errors import from_tensorflow, invalid

log = logging.getLogger("tfopt.serve")


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How versions are loaded.

    Attributes:
      intra_op: threads inside an operation, 0 for as many as cores.
      inter_op: threads for operations that can run side by side; 0: they run one by one in the request's own thread,
        which saves the way to the pool and back, 40 us of CPU, and leaves the cores to other requests.
      warmup: whether the requests in assets.extra are replayed.
      batching: None: none.
      batching_per_model: whether `batching_params.pbtxt` of a version stands above `batching`.
    """

    intra_op: int = 0
    inter_op: int = 0
    warmup: bool = True
    batching: BatchingParameters | None = None
    batching_per_model: bool = False


class Servable:
    """A loaded version.

    Attributes:
      signatures: SignatureDef by name, without those that initialize the model.
      all_signatures: with those.
      inputs, outputs: by signature, the graph tensor of each.
    """

    def __init__(self, name: str, version: int, path: Path, options: LoadOptions):
        """Loads; any exception of TensorFlow may leave it."""
        self.name = name
        self.version = version
        self.path = path
        self._callables: dict[tuple, Any] = {}
        self._batched: dict[str, Batched] = {}
        self._in_pool = bool(options.inter_op)
        self._lock = threading.Lock()
        config = config_pb2.ConfigProto(
            intra_op_parallelism_threads=options.intra_op, inter_op_parallelism_threads=options.inter_op
        )
        self._graph = tf.Graph()
        self._session: Any = tf.compat.v1.Session(graph=self._graph, config=config)
        try:
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
            self.all_signatures = dict(sorted(meta.signature_def.items()))
            self.signatures = {k: s for k, s in self.all_signatures.items() if not k.startswith("__saved_model_")}
            self.inputs = {k: _tensors(s.inputs) for k, s in self.signatures.items()}
            self.outputs = {k: _tensors(s.outputs) for k, s in self.signatures.items()}
            self._add_batching(options)
        except BaseException:
            self.close()
            raise

    def run(self, signature: str, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Answers.

        Args:
          signature: one of `signatures`.
          inputs: array of each input of the signature.
          outputs: names of the outputs wanted.

        Raises:
          ServingError: TensorFlow's own error.
        """
        batched = self._batched.get(signature)
        if batched is not None and (rows := _rows(inputs)):
            try:
                return self._run_batched(batched, signature, inputs, outputs, rows)
            except (tf.errors.InvalidArgumentError, tf.errors.FailedPreconditionError):
                pass  # perhaps another request of the batch was wrong: this one is answered by itself
            except (tf.errors.OpError, TypeError, ValueError, RuntimeError) as error:
                raise from_tensorflow(error) from error
        try:
            return self._callable(signature, tuple(inputs), outputs)(*inputs.values())
        except (tf.errors.OpError, TypeError, ValueError, RuntimeError) as error:
            raise from_tensorflow(error) from error

    def run_all(self, signature: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, scalars and strings as arrays too; see run."""
        found = self.run(signature, inputs, list(self.outputs[signature]))
        return {
            name: value
            if isinstance(value, np.ndarray)
            else np.asarray(value, object if isinstance(value, bytes) else None)
            for name, value in zip(self.outputs[signature], found, strict=True)
        }

    def _run_batched(
        self, batched: Batched, signature: str, inputs: dict[str, np.ndarray], outputs: Sequence[str], rows: int
    ) -> list[np.ndarray]:
        most, splits = batched.parameters.max_batch_size, batched.parameters.enable_large_batch_splitting
        if not splits and most is not None and rows > most:
            raise invalid(f"Task size {rows} is larger than maximum input batch size {most}")
        call = self._callable(signature, tuple(inputs), outputs, batched)
        with metrics.waiting(self.name, signature):
            *results, report = call(*inputs.values())
        metrics.batched(self.name, signature, report)
        return results

    def _callable(
        self, signature: str, inputs: tuple[str, ...], outputs: Sequence[str], batched: Batched | None = None
    ) -> Any:
        key = (signature, batched is None, inputs, *outputs)
        found = self._callables.get(key)
        if found is not None:
            return found
        tensors = self.outputs[signature] if batched is None else batched.outputs
        options = config_pb2.CallableOptions(
            feed=[self.inputs[signature][name] for name in inputs],
            fetch=[tensors[name] for name in outputs] + ([batched.report] if batched else []),
        )
        if not self._in_pool:
            options.run_options.inter_op_thread_pool = -1
        with self._lock:
            # Session.make_callable goes through Session.run, and its checks, at every call.
            return self._callables.setdefault(key, self._session._make_callable_from_options(options))

    def _add_batching(self, options: LoadOptions) -> None:
        parameters = options.batching
        own = self.path / batching_parameters.FILE
        if options.batching_per_model and own.is_file():
            parameters = batching_parameters.read(own)
        if parameters is None:
            return
        for name, signature in self.signatures.items():
            why = obstacle(signature, parameters)
            if why is None:
                try:
                    self._batched[name] = batch(self._graph, name, self.inputs[name], self.outputs[name], parameters)
                except (tf.errors.OpError, ValueError) as error:
                    why = one_line(error)
            if why is not None:
                log.warning("%s, version %d: signature %r is not batched: %s", self.name, self.version, name, why)

    def close(self) -> None:
        """Ends the session; nothing may run in it any more."""
        self._callables.clear()
        self._session.close()
        self._session = self._graph = None
        gc.collect()  # graphs are full of cycles


def _rows(inputs: dict[str, np.ndarray]) -> int:
    """The size that all arrays have along dimension 0.

    Raises:
      ServingError: they do not.
    """
    shapes = [array.shape for array in inputs.values()]
    if not all(shapes):
        raise invalid("Batching Run() input tensors must have at least one dimension")
    if any(shape[0] != shapes[0][0] for shape in shapes):
        raise invalid("Batching Run() input tensors must have equal 0th-dimension size")
    return shapes[0][0]


def _tensors(infos: Any) -> dict[str, str]:
    """Graph tensor of each input or output; components of sparse and ragged ones as `name:component`."""
    return {
        f"{name}:{component}" if component else name: tensor
        for name, info in sorted(infos.items())
        for component, tensor in tensor_names(info)
    }
