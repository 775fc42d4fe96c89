"""Second moments of what layers read, from representative rows; of the patches under the kernel for convolutions.

    S = 1/n sum_k p_k p_k'        G = (1 - l) S + l m I,  m = tr S / d
    l = min(1, b2 / ||S - m I||^2),  b2 = (1/n sum_k ||p_k||^4 - ||S||^2) / n

Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices": with few rows G leans to
the identity, which is the plain decomposition. Of a table of embeddings G is diagonal: how often each row is looked up,
where every row counts as looked up once more than it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfopt.calibration import values
from tfopt.data import Dataset
from tfopt.graph import Graph, join, split
from tfopt.low_rank.factors import Moment
from tfopt.low_rank.layers import Layer
from tfopt.model import Model
from tfopt.rules.constants import attr

MAX_SIZE = 4608  # a 3x3 kernel over 512 channels; the moments of larger patches take too much memory and time
MAX_ROWS = 512
_SAMPLES = 4096  # at least, where there are so many; and some for each dimension
_PER_DIMENSION = 4
_LEAST = 1e-4  # of the identity: inputs that are always 0 must not make G singular


class _Sum:
    """The moments of one layer, as they add up."""

    def __init__(self, layer: Layer, rows: int):
        self.layer = layer
        x, y, i, _ = layer.kernel.shape
        size = x * y * i
        self.lookups = layer.kind == "lookup"
        self.per_row = -(-max(_SAMPLES, _PER_DIMENSION * size) // rows)
        self.product = np.zeros(size if self.lookups else (size, size))
        self.fourth = 0.0
        self.sum = np.zeros(size)
        self.count = 0

    def add(self, patches: np.ndarray) -> None:
        """Adds samples (n, d), or ids."""
        if self.lookups:
            ids = patches.astype(np.int64).ravel()
            ids = ids[(ids >= 0) & (ids < len(self.product))]
            self.product += np.bincount(ids, minlength=len(self.product))
            self.count += len(ids)
            return
        self.product += patches.T @ patches
        self.sum += patches.sum(axis=0, dtype=np.float64)
        self.fourth += float(np.sum(np.sum(patches.astype(np.float64) ** 2, axis=1) ** 2))
        self.count += len(patches)

    def moment(self) -> Moment | None:
        """The estimate; None where there is nothing to estimate from."""
        if not self.count or not np.isfinite(self.product).all() or not self.product.any():
            return None
        if self.lookups:
            often = (self.product + 1) / (self.count + len(self.product))
            return Moment(np.sqrt(often), np.sqrt(often), often)
        second = self.product / self.count
        size = len(second)
        mean = np.trace(second) / size
        spread = float(np.sum(second**2)) - size * mean**2
        noise = (self.fourth / self.count - float(np.sum(second**2))) / self.count
        share = min(max(noise / spread, _LEAST), 1.0) if spread > 0 else 1.0
        second = (1 - share) * second
        second[np.diag_indices(size)] += share * mean
        x, y, i, _ = self.layer.kernel.shape
        taps = second.reshape(x * y, i, x * y, i)
        channels = np.einsum("aiaj->ij", taps) / (x * y)
        common = np.sqrt(1 - share) * self.sum / self.count
        return Moment(np.linalg.cholesky(second).T, np.linalg.cholesky(channels).T, common)


def moments(model: Model, signature: str, layers: Sequence[Layer], rows: Dataset, seed: int) -> dict[str, Moment]:
    """What layers read.

    Args:
      model: the model, before any layer is replaced.
      signature: the one that the rows are of.
      layers: of this model; nodes that the signature does not compute are left out.
      rows: representative rows; some are taken where there are many.
      seed: of the positions that are taken of each row.

    Returns:
      Weight of a layer -> moment. Layers that are too large, or that the signature does not compute, are left out.
    """
    rows = rows.take(slice(0, None, -(-len(rows) // MAX_ROWS)))
    live = computed(model, signature)
    sums = [
        _Sum(layer, len(rows))
        for layer in layers
        if layer.kind == "lookup" or np.prod(layer.kernel.shape[:3]) <= MAX_SIZE
    ]
    wanted: list[tuple[_Sum, str, str]] = []
    for each in sums:
        for name in each.layer.nodes:
            if name in live:
                operand = 1 if each.lookups else 1 - each.layer.index if each.layer.kind == "product" else 0
                wanted.append((each, name, join(*split(model.graph.nodes[name].input[operand]))))
    refs = list(dict.fromkeys(ref for _, _, ref in wanted))
    if not refs:
        return {}
    random = np.random.default_rng(seed)
    for start, tensors in values(model, signature, refs, rows):
        taken = len(rows) - start
        for each, name, ref in wanted:
            array = tensors[ref]
            each.add(_samples(model.graph, each, name, array, min(taken, len(array) if array.ndim else 1), random))
    found = {each.layer.weight: each.moment() for each in sums}
    return {weight: moment for weight, moment in found.items() if moment is not None}


def computed(model: Model, signature: str) -> set[str]:
    """The nodes that the outputs of a signature need."""
    from tfopt.inline import label, tensor_names

    outputs = [
        label(signature, name, part)
        for name, info in model.signatures[signature].outputs.items()
        for part, _ in tensor_names(info)
    ]
    return model.graph.reachable(split(model.graph.outputs[output])[0] for output in outputs)


def _samples(
    graph: Graph, each: _Sum, name: str, array: np.ndarray, rows: int, random: np.random.Generator
) -> np.ndarray:
    """Some of what a node reads, as vectors."""
    layer = each.layer
    if layer.kind == "lookup":
        return array
    if layer.kind == "product":
        of_x, of_w, of_out = layer.labels
        rest = [label for label in of_x if label not in of_w]
        summed = [label for label in of_w if label in of_x and label not in of_out]
        order = [of_x.index(label) for label in (*rest, *summed)]
        flat = np.transpose(array, order).reshape(-1, layer.kernel.shape[2])
        most = each.per_row * rows
        return flat if len(flat) <= most else flat[random.choice(len(flat), most, replace=False)]
    return _patches(graph, layer, name, array[:rows], each.per_row * rows, random)


def _patches(
    graph: Graph, layer: Layer, name: str, array: np.ndarray, most: int, random: np.random.Generator
) -> np.ndarray:
    """Random patches (n, x y i) under the kernel of a convolution, with the zeros of its padding."""
    node = graph.nodes[name]
    nchw = attr(node, "data_format").s == b"NCHW"
    array = np.moveaxis(array, 1, -1) if nchw else array
    first = 2 if nchw else 1
    kernel = layer.kernel.shape[:2]
    strides, dilations = layer.geometry[0].strides, layer.geometry[0].dilations
    padding = attr(node, "padding").s.decode()
    explicit = list(attr(node, "explicit_paddings").list.i)
    pads, counts = [], []
    for axis in range(2):
        size, reach = array.shape[1 + axis], (kernel[axis] - 1) * dilations[axis] + 1
        before, after = 0, 0
        if padding == "EXPLICIT":
            before, after = explicit[2 * (first + axis) : 2 * (first + axis) + 2]
        elif padding == "SAME":
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
            before, after = total // 2, total - total // 2
        pads.append((before, after))
        counts.append((size + before + after - reach) // strides[axis] + 1)
    padded = np.pad(array, ((0, 0), *pads, (0, 0)))
    places = len(padded) * counts[0] * counts[1]
    chosen = np.arange(places) if places <= most else random.choice(places, most, replace=False)
    row, down, right = np.unravel_index(chosen, (len(padded), *counts))
    high = (down * strides[0])[:, None] + np.arange(kernel[0]) * dilations[0]
    wide = (right * strides[1])[:, None] + np.arange(kernel[1]) * dilations[1]
    patches = padded[row[:, None, None], high[:, :, None], wide[:, None, :]]
    return patches.reshape(len(chosen), -1)
