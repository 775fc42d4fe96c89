"""The zeros and clusters of a model are in its quantized files, and it is told where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import rows, save_module, spec
from tfopt import model as models
from tfopt.data import Dataset
from tfopt.export import saved_model, tflite
from tfopt.export.fake_quant_form import for_converter
from tfopt.export.fixed_batch import fix_batch
from tfopt.export.tflite_file import TfliteFile
from tfopt.export.tflite_losses import losses
from tfopt.passes import Data, cluster, fold_affine, fold_constants, prune_graph, quantize, train_quantized
from tfopt.rewrite import Log

RANDOM = np.random.default_rng(0)
CONV, DENSE = 3 * 3 * 4 * 24, 24 * 64
FILES = ("float32", "int8", "dynamic_int8", "weight_int8", "int16x8")


class Net(tf.Module):
    """A convolution whose channels have ranges of their own, and a dense layer, half of both zeros."""

    def __init__(self):
        super().__init__()
        conv = RANDOM.laplace(size=(3, 3, 4, 24)) * np.linspace(0.05, 0.3, 24)
        dense = RANDOM.laplace(size=(24, 64)) * np.linspace(0.1, 0.4, 64)
        self.conv, self.dense = (
            tf.Variable(np.where(np.abs(w) < np.median(np.abs(w)), 0, w).astype(np.float32)) for w in (conv, dense)
        )

    @tf.function(input_signature=[spec(None, 6, 6, 4)])
    def serving_default(self, x):
        h = tf.nn.relu(tf.nn.conv2d(x, self.conv, 1, "SAME") + 0.1)
        return {"y": tf.nn.relu(tf.reduce_mean(h, [1, 2]) @ self.dense + 0.1)}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset({"x": rows(96, 6, 6, 4)}, None, "rows")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruned") / "net"
    save_module(path, Net(), "serving_default")
    model = models.load(path)
    for each in (prune_graph, fold_constants, fold_affine):
        each.run(model, Log())
    return model


def files(model, quantized, data, folder, names, trained=False) -> dict[str, TfliteFile]:
    float_, fake = folder / "float", folder / "fake"
    saved_model.save(fix_batch(model, 1), float_, max_constant_bytes=1 << 31)
    fixed = fix_batch(quantized, 1)
    for_converter(fixed)
    saved_model.save(fixed, fake, max_constant_bytes=1 << 31)
    made = tflite.convert(
        float_, names, folder, representative={"serving_default": data}, fake_quantized=fake, trained=trained
    )
    assert not any(result.error for result in made)
    return {result.name: TfliteFile(result.path) for result in made}


def kernels(file: TfliteFile) -> dict[int, np.ndarray]:
    return {array.size: array for _, array in file.constants() if array.size in (CONV, DENSE)}


def test_clusters_and_zeros_are_in_every_file(pruned, data, tmp_path):
    clustered, log = pruned.copy(), Log()
    cluster.run(clustered, log, Data("serving_default", pruned), clusters=8, epochs=0)
    quantized = clustered.copy()
    quantize.run(quantized, Log(), Data("serving_default", pruned, data))
    made = files(clustered, quantized, data, tmp_path, FILES)
    wanted = kernels(made["float32"])
    for name, file in made.items():
        assert losses(file, made["float32"]) == [], name
        for size, kernel in kernels(file).items():
            assert len(np.unique(kernel)) <= 8
            assert np.count_nonzero(kernel == 0) >= np.count_nonzero(wanted[size] == 0) >= size // 2 - 1


def test_training_through_the_quantization_keeps_both(pruned, data, tmp_path):
    clustered = pruned.copy()
    cluster.run(clustered, Log(), Data("serving_default", pruned), clusters=8, epochs=0)
    quantized, log = clustered.copy(), Log()
    train_quantized.run(quantized, log, Data("serving_default", pruned, data), epochs=3, learning_rate=1e-3)
    made = files(clustered, quantized, data, tmp_path, ("float32", "int8"), trained=True)
    assert losses(made["int8"], made["float32"]) == []
    before = kernels(made["float32"])
    for size, kernel in kernels(made["int8"]).items():
        assert kernel.dtype == np.int8 and len(np.unique(kernel)) <= 8
        assert np.count_nonzero(kernel == 0) >= np.count_nonzero(before[size] == 0)


class Made:
    """A file of these kernels."""

    def __init__(self, *kernels: np.ndarray):
        self._kernels = kernels

    def constants(self) -> list[tuple[set[str], np.ndarray]]:
        return [({str(number)}, kernel) for number, kernel in enumerate(self._kernels)]


FREE = RANDOM.normal(size=(20, 30))
SPARSE = np.where(np.abs(FREE) < 0.5, 0, FREE)
FEW = RANDOM.choice([-3.0, 1.0, 5.0], (20, 30))


@pytest.mark.parametrize(
    ("made", "base", "lost"),
    [
        ([FREE], [FREE], None),
        ([SPARSE, FREE], [FREE, SPARSE], []),
        ([FREE, FREE], [FREE, SPARSE], ["zeros"]),
        ([FREE, FEW], [FEW, FREE], []),
        ([np.round(9 * FREE), FREE], [FEW, FREE], ["clusters"]),
        ([FREE, FREE], [np.where(FEW == 1, 0, FEW), FREE], ["zeros", "clusters"]),
        ([FREE], [FREE, FEW], ["clusters"]),  # one that was left out
    ],
)
def test_what_is_lost_is_told(made, base, lost):
    assert losses(Made(*made), Made(*base)) == lost
