"""Which weights of which kernels become zero: scores, patterns, and how a target is shared out among layers.

    magnitude   |w|                                                             (Han et al. 2015)
    lamp        w_u^2 / sum over v of the layer with |w_v| >= |w_u| of w_v^2    (Lee et al. 2021), alike in all layers

The lowest scores go first. Within a layer both give one order; they differ in what a layer has to give beside others.

    N:M         of M neighbours along the input axis the N largest stay         (Mishra et al. 2021)
    RxC         blocks of R output channels by C inputs go or stay as one, by the sum of w^2

Neighbours are neighbours in the layout in which device kernels read weights: [outputs, inputs] of a dense layer,
[outputs, height, width, input channels] of a convolution, so along input channels, at one place of the window.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tfopt.errors import TfoptError
from tfopt.rewrite import Refused

CRITERIA = ("lamp", "magnitude")
SCOPES = ("global", "layer")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which weights can go without others.

    Attributes:
      keep, of: of N:M; 0 where there is none.
      rows, columns: of a block; 1 x 1 where each weight is on its own.
    """

    keep: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads "" (none), "2:4" or "1x4".

        Raises:
          TfoptError: it is something else.
        """
        if not text:
            return cls()
        found = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        left, right = (int(found[1]), int(found[3])) if found else (0, 0)
        if found and found[2] == ":" and 0 < left < right:
            return cls(keep=left, of=right)
        if found and found[2] == "x" and left and right and left * right > 1:
            return cls(rows=left, columns=right)
        raise TfoptError(
            f"pattern must be N:M such as 2:4 (2 of 4 stay), RxC such as 1x4 (blocks), or empty; received {text!r}"
        )

    @property
    def plain(self) -> bool:
        """Whether each weight is on its own."""
        return not self.of and self.rows * self.columns == 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the inputs of a kernel are.

    Attributes:
      summed: the axes that an output sums over, the input channels last; None where they are not known.
    """

    summed: tuple[int, ...] | None

    def check(self, pattern: Pattern, shape: Sequence[int]) -> None:
        """Raises Refused where a kernel of this shape cannot have the pattern."""
        if pattern.plain:
            return
        if self.summed is None:
            raise Refused("how its inputs lie is not known: it is moved before it is used")
        inputs = shape[self.summed[-1]]
        if pattern.of and inputs % pattern.of:
            raise Refused(f"{inputs} inputs do not make groups of {pattern.of}")

    def matrix(self, kernel: np.ndarray) -> np.ndarray:
        """[outputs, ..., inputs] -> (outputs, places x inputs), a view or a copy."""
        assert self.summed is not None
        others = [axis for axis in range(kernel.ndim) if axis not in self.summed]
        size = math.prod(kernel.shape[axis] for axis in others)
        return kernel.transpose(*others, *self.summed).reshape(size, -1)

    def kernel(self, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The inverse of `matrix`."""
        assert self.summed is not None
        order = [*(axis for axis in range(len(shape)) if axis not in self.summed), *self.summed]
        return matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kernel that loses weights.

    Attributes:
      layout: where its inputs are.
      most: the largest share of it that may go.
    """

    layout: Layout
    most: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """How weights are chosen.

    Attributes:
      scope: "global" takes the lowest scores of all layers together, "layer" the same share of each.
      criterion: of CRITERIA; what layers are compared by, where the scope is global.
      pattern: which weights go together.
      least: a layer that would lose a smaller share than this loses nothing.
    """

    scope: str = "global"
    criterion: str = "lamp"
    pattern: Pattern = Pattern()
    least: float = 0.1

    def __post_init__(self):
        for name, value, known in (("scope", self.scope, SCOPES), ("criterion", self.criterion, CRITERIA)):
            if value not in known:
                raise TfoptError(f"{name} must be one of {', '.join(known)}; received {value!r}")

    def masks(
        self, layers: Mapping[str, Layer], kernels: Mapping[str, np.ndarray], share: float
    ) -> dict[str, np.ndarray]:
        """What stays of each kernel.

        Args:
          layers: name -> layer; a kernel must fit the pattern (see `Layout.check`).
          kernels: name -> values.
          share: of all their weights that is to go; with N:M, of those that go in the end.

        Returns:
          name -> boolean, in the shape of the kernel. Fewer go where the layers may not lose as many.
        """
        units = {name: _units(kernels[name], layer, self) for name, layer in layers.items()}
        while True:
            gone = self._gone(units, share)
            few = [name for name, u in units.items() if 0 < u.sizes[gone[name]].sum() < self.least * u.size and u.free]
            if not few:
                break
            # Later passes would not see that it was pruned; the others take over what it does not lose.
            units = {name: dataclasses.replace(u, free=0) if name in few else u for name, u in units.items()}
        return {name: _expand(~gone[name], kernels[name], layers[name], self.pattern) for name in layers}

    def _gone(self, units: Mapping[str, _Units], share: float) -> dict[str, np.ndarray]:
        """Which units go, as many as the share wants, or as can."""
        gone = {name: np.zeros(len(unit.score), bool) for name, unit in units.items()}
        if self.pattern.of or self.scope == "layer":
            for name, unit in units.items():
                wanted = round(share * (unit.sizes[unit.order[: unit.free]].sum() if self.pattern.of else unit.size))
                gone[name][unit.order[: min(unit.free, unit.count(wanted))]] = True
            return gone
        wanted = round(share * sum(unit.size for unit in units.values()))
        names = list(units)
        scores = np.concatenate([units[name].score[units[name].order[: units[name].free]] for name in names])
        owner = np.repeat(np.arange(len(names)), [units[name].free for name in names])
        sizes = np.concatenate([units[name].sizes[units[name].order[: units[name].free]] for name in names])
        lowest = np.argsort(scores, kind="stable")
        lowest = lowest[: int(np.searchsorted(np.cumsum(sizes[lowest]), wanted, side="right"))]
        for index, count in enumerate(np.bincount(owner[lowest], minlength=len(names))):
            # The score of a layer rises along its order, so the lowest ones are the first ones.
            gone[names[index]][units[names[index]].order[:count]] = True
        return gone


@dataclasses.dataclass(frozen=True)
class _Units:
    """What goes or stays as one: weights, or blocks.

    Attributes:
      score: (units,), comparable between layers.
      order: indices, lowest score first; with N:M, what may go comes first.
      sizes: (units,), how many weights each has.
      free: how many of `order` may go.
      size: how many weights the kernel has.
    """

    score: np.ndarray
    order: np.ndarray
    sizes: np.ndarray
    free: int
    size: int

    def count(self, weights: int) -> int:
        """How many units, in order, have no more than so many weights."""
        return int(np.searchsorted(np.cumsum(self.sizes[self.order]), weights, side="right"))


def _units(kernel: np.ndarray, layer: Layer, rule: Rule) -> _Units:
    pattern = rule.pattern
    power = np.square(kernel, dtype=np.float64)
    sizes = np.ones(kernel.size, np.int64)
    if pattern.plain:
        power = power.ravel()
    elif pattern.of:
        power = layer.layout.matrix(power).ravel()
    else:
        power = _blocks(layer.layout.matrix(power), pattern)
        sizes = _blocks(layer.layout.matrix(np.ones(kernel.shape)), pattern).astype(np.int64)
    order = np.argsort(power, kind="stable")
    free = len(order)
    if pattern.of:
        groups = power.reshape(-1, pattern.of)
        small = np.zeros(groups.shape, bool)
        chosen = np.argsort(groups, axis=1, kind="stable")[:, : pattern.of - pattern.keep]
        np.put_along_axis(small, chosen, True, axis=1)
        small = small.ravel()
        order = np.concatenate([order[small[order]], order[~small[order]]])
        free = int(small.sum())
    else:
        free = int(np.searchsorted(np.cumsum(sizes[order]), round(layer.most * kernel.size), side="right"))
    score = np.sqrt(power / sizes)
    if rule.criterion == "lamp":
        score = np.empty_like(power)
        rest = np.cumsum(power[order][::-1])[::-1]
        score[order] = np.divide(power[order], rest, out=np.zeros_like(rest), where=rest > 0)
    return _Units(score, order, sizes, free, kernel.size)


def _blocks(matrix: np.ndarray, pattern: Pattern) -> np.ndarray:
    """(blocks,): the sum over each block; what is missing at the edges counts as 0."""
    rows, columns = -(-matrix.shape[0] // pattern.rows), -(-matrix.shape[1] // pattern.columns)
    padded = np.zeros((rows * pattern.rows, columns * pattern.columns), matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(rows, pattern.rows, columns, pattern.columns).sum((1, 3)).ravel()


def _expand(stays: np.ndarray, kernel: np.ndarray, layer: Layer, pattern: Pattern) -> np.ndarray:
    """From units to the shape of the kernel."""
    if pattern.plain:
        return stays.reshape(kernel.shape)
    matrix = layer.layout.matrix(kernel)
    if pattern.of:
        return layer.layout.kernel(stays.reshape(matrix.shape), kernel.shape)
    columns = -(-matrix.shape[1] // pattern.columns)
    wide = stays.reshape(-1, columns).repeat(pattern.rows, 0).repeat(pattern.columns, 1)
    return layer.layout.kernel(wide[: matrix.shape[0], : matrix.shape[1]], kernel.shape)


def zeros(kernels: Iterable[np.ndarray]) -> float:
    """The share of exact zeros of some kernels together."""
    counts = [(kernel.size, int(np.count_nonzero(kernel))) for kernel in kernels]
    size, other = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return 1 - other / size if size else 0.0
