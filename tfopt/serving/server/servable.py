"""One version of a model, loaded into a v1 session, which is how TensorFlow Serving runs a SavedModel."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from tfopt.inline import tensor_names
from tfopt.serving.server.errors import from_tensorflow


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How versions are loaded; parallelisms are of TensorFlow's thread pools, 0 for as many as cores."""

    intra_op: int = 0
    inter_op: int = 0
    warmup: bool = True


class Servable:
    """A loaded version.

    Attributes:
      signatures: SignatureDef by name.
    """

    def __init__(self, name: str, version: int, path: Path, options: LoadOptions):
        """Loads; any exception of TensorFlow may leave it."""
        self.name = name
        self.version = version
        self.path = path
        self._callables: dict[tuple, Any] = {}
        self._lock = threading.Lock()
        config = config_pb2.ConfigProto(
            intra_op_parallelism_threads=options.intra_op, inter_op_parallelism_threads=options.inter_op
        )
        self._graph = tf.Graph()
        self._session: Any = tf.compat.v1.Session(graph=self._graph, config=config)
        try:
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
        except BaseException:
            self._session.close()
            raise
        self.signatures = {k: s for k, s in sorted(meta.signature_def.items()) if not k.startswith("__")}
        self.inputs = {k: _tensors(s.inputs) for k, s in self.signatures.items()}
        self.outputs = {k: _tensors(s.outputs) for k, s in self.signatures.items()}

    def run(self, signature: str, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Answers.

        Args:
          signature: one of `signatures`.
          inputs: array of each input of the signature.
          outputs: names of the outputs wanted.

        Raises:
          ServingError: TensorFlow's own error.
        """
        key = (signature, *inputs, None, *outputs)
        call = self._callables.get(key) or self._make_callable(key, signature, list(inputs), outputs)
        try:
            return call(*inputs.values())
        except (tf.errors.OpError, TypeError, ValueError, RuntimeError) as error:
            raise from_tensorflow(error) from error

    def _make_callable(self, key: tuple, signature: str, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        options = config_pb2.CallableOptions(
            feed=[self.inputs[signature][name] for name in inputs],
            fetch=[self.outputs[signature][name] for name in outputs],
        )
        with self._lock:
            if key not in self._callables:
                # Session.make_callable goes through Session.run, and its checks, at every call.
                self._callables[key] = self._session._make_callable_from_options(options)
            return self._callables[key]

    def close(self) -> None:
        """Ends the session; nothing may run in it any more."""
        self._callables.clear()
        self._session.close()
        self._session = self._graph = None


def _tensors(infos: Any) -> dict[str, str]:
    """Graph tensor of each input or output; components of sparse and ragged ones as `name:component`."""
    return {
        f"{name}:{component}" if component else name: tensor
        for name, info in sorted(infos.items())
        for component, tensor in tensor_names(info)
    }
