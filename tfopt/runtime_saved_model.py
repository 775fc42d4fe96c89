"""SavedModel directories behind the face of runtime.Program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt.data import STRING, TensorSpec
from tfopt.errors import TfoptError
from tfopt.inline import tensor_names
from tfopt.runtime import PYTHON, SESSION, Outputs, Program, Signature, one_line


class SessionProgram(Program):
    """A SavedModel in a v1 session."""

    def __init__(self, path: str, threads: int | None, fall_back: bool):
        super().__init__(path)
        self.loader = SESSION
        self._threads = threads
        self._substitute: PythonProgram | None = None
        self._may_fall_back = fall_back
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=threads or 0, inter_op_parallelism_threads=threads or 0
        )
        self._graph = tf.Graph()
        self._session: Any = tf.compat.v1.Session(graph=self._graph, config=config)
        try:
            with _quiet():
                meta_graph = tf.compat.v1.saved_model.load(self._session, ["serve"], path)
        except Exception as error:
            self._session.close()
            raise TfoptError(f"{path} does not load in a v1 session: {one_line(error)}") from error
        self._infos = {k: s for k, s in sorted(meta_graph.signature_def.items()) if not k.startswith("__")}
        if not self._infos:
            self._session.close()
            raise TfoptError(f"{path} has no signatures")
        self.signatures = {
            key: Signature(self._specs(info.inputs), self._specs(info.outputs)) for key, info in self._infos.items()
        }

    def _specs(self, infos: Mapping[str, Any]) -> dict[str, TensorSpec]:
        specs = {}
        for name, tensor in _tensors(infos).items():
            info = infos.get(name)
            if info is None:  # a component of a sparse or ragged tensor
                specs[name] = _spec(name, self._graph.get_tensor_by_name(tensor).dtype.base_dtype, None)
                continue
            shape = None if info.tensor_shape.unknown_rank else [d.size for d in info.tensor_shape.dim]
            specs[name] = _spec(name, tf.as_dtype(info.dtype).base_dtype, shape)
        return specs

    def _bind(self, signature: str, arrays: dict[str, np.ndarray]) -> Callable[[], Outputs]:
        if self._substitute:
            return self._substitute._bind(signature, arrays)
        info = self._infos[signature]
        names = list(self.signatures[signature].outputs)
        try:
            inputs, outputs = _tensors(info.inputs), _tensors(info.outputs)
            call = self._session.make_callable([outputs[name] for name in names], [inputs[name] for name in arrays])
        except (ValueError, KeyError, RuntimeError, tf.errors.OpError) as error:
            raise self._failed(signature, error) from error
        values = list(arrays.values())

        def run() -> Outputs:
            if self._substitute:
                return self._substitute._bind(signature, arrays)()
            try:
                return dict(zip(names, map(np.asarray, call(*values)), strict=True))
            except tf.errors.FailedPreconditionError as error:
                if not self._may_fall_back or "variable" not in str(error):
                    raise self._failed(signature, error) from error
            except (tf.errors.OpError, ValueError, TypeError) as error:
                raise self._failed(signature, error) from error
            # The variables that the signature reads are not those that the session's restore filled.
            self._substitute = PythonProgram(self.path, self._threads)
            self.loader = self._substitute.loader
            return self._substitute._bind(signature, arrays)()

        return run

    def close(self) -> None:
        """Ends the session, and with it its variables."""
        self._session.close()
        self._session = None
        self._substitute = None


class PythonProgram(Program):
    """A SavedModel as tf.saved_model.load gives it."""

    def __init__(self, path: str, threads: int | None):
        super().__init__(path)
        self.loader = PYTHON
        if threads:
            try:
                tf.config.threading.set_intra_op_parallelism_threads(threads)
                tf.config.threading.set_inter_op_parallelism_threads(threads)
            except RuntimeError:
                pass  # the process has run ops already: its threads are fixed
        try:
            with _quiet():
                # Held, since signatures refer to their variables weakly.
                self._loaded: Any = tf.saved_model.load(path)
        except Exception as error:
            raise TfoptError(f"{path} does not load: {one_line(error)}") from error
        self._functions: Any = dict(sorted(getattr(self._loaded, "signatures", {}).items()))
        if not self._functions:
            raise TfoptError(f"{path} has no signatures")
        self.signatures = {}
        for key, function in self._functions.items():
            inputs, outputs = function.structured_input_signature[1], function.structured_outputs
            self.signatures[key] = Signature(
                {n: _spec(n, s.dtype, _dims(s.shape)) for n, s in sorted(inputs.items())},
                {n: _spec(n, s.dtype, _dims(s.shape)) for n, s in sorted(outputs.items())},
            )

    def _bind(self, signature: str, arrays: dict[str, np.ndarray]) -> Callable[[], Outputs]:
        function = self._functions[signature]
        specs = self.signatures[signature].inputs
        tensors = {
            n: tf.constant(a, tf.string if specs[n].dtype == STRING else specs[n].dtype) for n, a in arrays.items()
        }

        def run() -> Outputs:
            try:
                return {name: tensor.numpy() for name, tensor in sorted(function(**tensors).items())}
            except (tf.errors.OpError, ValueError, TypeError) as error:
                raise self._failed(signature, error) from error

        return run

    def close(self) -> None:
        """Drops the model."""
        self._functions = self._loaded = None


def _tensors(infos: Mapping[str, Any]) -> dict[str, str]:
    """The tensors of a signature's inputs or outputs; components of sparse and ragged ones as `name:component`."""
    return {
        f"{name}:{component}" if component else name: tensor
        for name, info in sorted(infos.items())
        for component, tensor in tensor_names(info)
    }


def _spec(name: str, dtype: Any, shape: Any) -> TensorSpec:
    dims = None if shape is None else tuple(None if d is None or d < 0 else int(d) for d in shape)
    return TensorSpec(name, STRING if dtype.name == "string" else np.dtype(dtype.as_numpy_dtype), dims)


def _dims(shape: Any) -> list[int | None] | None:
    return None if shape.rank is None else shape.as_list()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the deprecation warnings of the v1 loader."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
