"""Running a model in memory: the pure function f(weights, inputs), with the state it may carry from call to call."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.config_pb2 import ConfigProto
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

from tfopt.errors import TfoptError, one_line
from tfopt.graph import split
from tfopt.inline import label, tensor_names
from tfopt.model import Model
from tfopt.serving import request


class Function:
    """A model that can be called; a context manager.

    Calls run the graph as it is, without TensorFlow's own graph optimizations, so that what is compared are tfopt's
    rewrites and not somebody else's. State variables start from their restored values and live as long as this object.
    """

    def __init__(self, model: Model, threads: int = 0):
        """Prepares to run `model`.

        Args:
          model: the model; rewriting it afterwards does not change this object.
          threads: intra-op threads; 0 lets TensorFlow choose.

        Raises:
          TfoptError: TensorFlow rejects the graph, or cannot initialise it.
        """
        config = ConfigProto(intra_op_parallelism_threads=threads)
        config.graph_options.optimizer_options.opt_level = -1
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.graph_options.rewrite_options.constant_folding = RewriterConfig.OFF
        self._model = model
        self._weights = {f"{name}:0": value for name, value in model.weights.items()}
        self._graph = tf.Graph()
        try:
            with self._graph.as_default():
                tf.graph_util.import_graph_def(model.graph.to_graph_def(model.library()), name="")
                restore = self._restore_ops()
            self._session = tf.compat.v1.Session(graph=self._graph, config=config)
            for op, feeds in restore:
                self._session.run(op, feeds)
            if model.init:
                self._session.run(self._graph.get_operation_by_name(model.init), {**self._weights, **self._assets()})
        except (tf.errors.OpError, ValueError, TypeError, KeyError) as error:
            raise TfoptError(f"{model.directory}: TensorFlow cannot set the model up: {one_line(error)}") from error

    def __enter__(self) -> Function:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the session and its state."""
        self._session.close()

    def __call__(
        self, signature: str, inputs: Mapping[str, np.ndarray], instead: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Runs one signature.

        Args:
          signature: its name.
          inputs: input name -> array; components of sparse inputs as `name:component`. Where a pass has changed the
            inputs of this signature: those of the original one.
          instead: reference of a tensor of the main body, such as a weight -> what to put in its place in this call.

        Returns:
          Output name (`name:component` for sparse ones) -> array.

        Raises:
          TfoptError: TensorFlow cannot run it: a missing kernel, bad shapes, an op that fails.
        """
        steps = self._model.requests.get(signature, ())
        return request.call(steps, lambda arrays: self._run(signature, arrays, instead or {}), inputs)

    def _run(
        self, signature: str, inputs: Mapping[str, np.ndarray], instead: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        definition = self._model.signatures[signature]
        feeds = {**self._weights, **{_with_port(ref): value for ref, value in instead.items()}}
        for name, info in definition.inputs.items():
            for component, tensor in tensor_names(info):
                feeds[_with_port(tensor)] = inputs[f"{name}:{component}" if component else name]
        fetches = {}
        for name, info in sorted(definition.outputs.items()):
            for component, _ in tensor_names(info):
                ref = self._model.graph.outputs[label(signature, name, component)]
                fetches[f"{name}:{component}" if component else name] = _with_port(ref)
        try:
            outputs = self._session.run(fetches, feeds)
        except (tf.errors.OpError, ValueError, TypeError) as error:
            raise TfoptError(f"signature {signature!r} cannot be run: {one_line(error)}") from error
        # A scalar string comes as bytes.
        return {name: np.asarray(v, object) if isinstance(v, bytes) else np.asarray(v) for name, v in outputs.items()}

    def _restore_ops(self) -> list[tuple[tf.Operation, dict[tf.Tensor, np.ndarray]]]:
        """Adds what fills state variables and mutable tables; returns ops with what to feed them."""
        restore = []
        for name, value in self._model.state.items():
            handle = self._graph.get_tensor_by_name(f"{name}:0")
            feed = tf.compat.v1.placeholder(tf.as_dtype(value.dtype), value.shape)
            restore.append((tf.raw_ops.AssignVariableOp(resource=handle, value=feed), {feed: value}))
        for name, (keys, values) in self._model.tables.items():
            handle = self._graph.get_tensor_by_name(f"{name}:0")
            feed_keys = tf.compat.v1.placeholder(_dtype(self._graph, name, "key_dtype"), keys.shape)
            feed_values = tf.compat.v1.placeholder(_dtype(self._graph, name, "value_dtype"), values.shape)
            op = tf.raw_ops.LookupTableImportV2(table_handle=handle, keys=feed_keys, values=feed_values)
            restore.append((op, {feed_keys: keys, feed_values: values}))
        return restore

    def _assets(self) -> dict[str, str]:
        return {
            _with_port(asset.tensor_info.name): str(self._model.directory / "assets" / asset.filename)
            for asset in self._model.assets
        }


def _with_port(ref: str) -> str:
    name, port = split(ref)
    return f"{name}:{port}"


def _dtype(graph: tf.Graph, node: str, attr: str) -> tf.DType:
    return graph.get_operation_by_name(node).get_attr(attr)
