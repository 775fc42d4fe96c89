"""Random graphs of inputs sent once and of N rows: whatever the ops and their order, answers are those of N rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.graph import Graph
from tfopt.model import Model
from tfopt.passes import broadcast_inputs
from tfopt.rewrite import Log
from tfopt.verify import difference

v1 = tf.compat.v1
INPUTS = {"user_a": (4,), "user_s": (3, 4), "user_v": (), "c_a": (4,), "c_s": (3, 4), "c_v": ()}


class _Builder:
    """Grows a random graph, op by op; what TensorFlow rejects is left out."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.pool = [v1.placeholder(tf.float32, [None, *shape], name) for name, shape in INPUTS.items()]

    def pick(self, rank: int | None = None) -> tf.Tensor:
        """A tensor, of this rank, rather a late one."""
        fitting = [t for t in self.pool if t.shape.rank is not None and rank in (None, t.shape.rank)]
        return fitting[int(len(fitting) * self.random.random() ** 0.6)]

    def weight(self, *shape: int) -> tf.Tensor:
        return tf.constant(self.random.normal(size=shape).astype(np.float32))

    def axis(self, tensor: tf.Tensor, more: int = 0) -> int:
        return int(self.random.integers(0, tensor.shape.rank + more))

    def count(self) -> tf.Tensor:
        return tf.shape(self.pick())[0]

    def product(self) -> tf.Tensor:
        x = self.pick(2)
        y = tf.matmul(x, self.weight(x.shape[-1], 4))
        return [y, tf.nn.bias_add(y, self.weight(4)), y + self.weight(1, 4)][self.random.integers(3)]

    def concat_and_product(self) -> tf.Tensor:
        parts = [self.pick(2), self.pick(2), *self.pool[::3][: int(self.random.integers(0, 2))]]
        x = tf.concat(parts, self.random.choice([1, 1, -1, 0]))
        x = tf.nn.relu(x * self.weight(x.shape[-1])) if self.random.random() < 0.5 else x
        return tf.matmul(x, self.weight(x.shape[-1], 4)) + self.weight(4)

    def step(self) -> None:
        ops: list[Callable[[], tf.Tensor]] = [
            lambda: tf.tanh(self.pick()),
            *[lambda: self.pick() + self.pick(), lambda: self.pick() * self.pick(), lambda: self.pick() - self.pick()],
            *[self.product] * 3,
            *[self.concat_and_product] * 4,
            lambda: tf.reduce_sum(x := self.pick(), self.axis(x), keepdims=bool(self.random.integers(2))),
            lambda: tf.reshape(self.pick(), [-1, int(self.random.choice([4, 2, 12, 1, 3]))]),
            lambda: tf.reshape(self.pick(), tf.stack([self.count(), -1])),
            lambda: tf.expand_dims(x := self.pick(), self.axis(x, 1)),
            lambda: tf.transpose(x := self.pick(), self.random.permutation(x.shape.rank)),
            *[lambda: self.pick(3)[:, 0], lambda: self.pick(2)[0], lambda: tf.squeeze(self.pick())],
            lambda: tf.matmul(self.pick(2), self.pick(2), transpose_b=True),
            lambda: tf.matmul(self.pick(3), self.pick(3), transpose_b=True),
            lambda: tf.einsum("nsd,nd->ns", self.pick(3), self.pick(2)),
            lambda: tf.einsum("ni,nj->nij", self.pick(2), self.pick(2)),
            lambda: tf.where((x := self.pick()) > 0, x, self.pick()),
            lambda: tf.nn.softmax(x := self.pick(), self.axis(x)),
            lambda: tf.cumsum(x := self.pick(), self.axis(x)),
            lambda: tf.zeros([self.count(), 4]) + self.weight(1, 4),
            lambda: tf.tile(self.weight(1, 4), [self.count(), 1]),
            lambda: tf.broadcast_to(self.weight(4), [self.count(), 4]),
            lambda: tf.tile(x := self.pick(), self.random.integers(1, 3, x.shape.rank)),
            lambda: tf.stack([x := self.pick(), self.pick(x.shape.rank)], self.axis(x, 1)),
            lambda: tf.slice(x := self.pick(), [0] * x.shape.rank, [self.count()] + [-1] * (x.shape.rank - 1)),
            lambda: tf.gather(x := self.pick(), tf.zeros_like(self.pick(1), tf.int32), axis=self.axis(x)),
            lambda: tf.reduce_mean(tf.one_hot(tf.cast(self.pick(), tf.int32), self.count()), -1),
            lambda: self.pick(1) * tf.cast(self.count(), tf.float32),
        ]
        try:
            result = ops[self.random.integers(len(ops))]()
        except (ValueError, TypeError, IndexError):
            return
        if result.shape.rank is not None and result.shape.rank <= 4:
            self.pool.append(result)


def _model(seed: int) -> Model:
    signature, labels = SignatureDef(), {}
    with tf.Graph().as_default() as graph:
        builder = _Builder(seed)
        for name, tensor in zip(INPUTS, builder.pool, strict=True):
            signature.inputs[name].CopyFrom(v1.saved_model.build_tensor_info(tensor))
        for _ in range(12):
            builder.step()
        for number, tensor in enumerate(builder.pool[-5:]):
            result = tf.identity(tensor)
            signature.outputs[f"y{number}"].CopyFrom(v1.saved_model.build_tensor_info(result))
            labels[f"s:y{number}"] = result.name
    body = Graph(graph.as_graph_def().node, labels, arguments=INPUTS)
    return Model(body, {}, {"s": signature}, {}, {}, None, [], Path(), ["serve"], 0, "", [])


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_random_graphs(first):
    compared = split = once = 0
    for seed in range(first, first + 25):
        model = _model(seed)
        rewritten, log = model.copy(), Log()
        broadcast_inputs.run(rewritten, log, "user_*")
        rewritten.check()
        if not log.applied:  # TensorFlow says that such shapes do not fit
            assert "one row does not fit" in log.refused["input sent once", "s"]
            continue
        split += log.applied["product split into one row and the others"]
        once += int(log.notes[0].split()[0])
        random = np.random.default_rng(seed)
        with Function(model) as before, Function(rewritten) as after:
            for count in (1, 2, 4, 5):
                rows = {n: random.normal(size=(count, *shape)).astype(np.float32) for n, shape in INPUTS.items()}
                rows = {n: np.repeat(a[:1], count, 0) if n.startswith("user") else a for n, a in rows.items()}
                try:
                    expected = before("s", rows)
                except TfoptError:
                    continue  # these shapes do not fit for so many rows
                found = difference(expected, after("s", rows))
                assert found.broken is None, f"seed {seed}, {count} rows: {found}"
                compared += 1
    assert compared >= 30 and split >= 2 and once >= 40, (compared, split, once)
