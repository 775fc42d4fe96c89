"""Which layers are factored, how, and with what ranks.

    energy   for each layer the cheapest factors with an error of at most 1 - energy, see `tfopt.low_rank.factors.error`
    vbmf     the same, with the error that the ranks found by variational Bayes leave (Kim et al. 2016)
    flops    min sum_L h_L(e_L)  so that a share of the FLOPs goes: greedily by harm for each FLOP saved, on the lower
             convex hull of each layer; h_L is the error of the outputs, as a function of the layer's own

`svd` and `spatial` have their errors from one spectrum, `tucker` from the truncated higher-order SVD, for all ranks at
once; without rows these are exact. With rows the points that are looked at are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tfopt.low_rank import factors, vbmf
from tfopt.low_rank.factors import Factors, Moment
from tfopt.low_rank.layers import Layer
from tfopt.rewrite import Refused

STEP = 8  # larger ranks are multiples of it: kernels work in such blocks, and 9 costs as much as 16
WORST = 0.5  # for the sake of FLOPs no layer gets a larger error than this share of its output
GAIN = 0.95  # factors that cost more than this are not worth two ops in the place of one
POINTS = 10  # of each method, in a search over all layers
CP_ELEMENTS = 20_000  # cp is found by alternating least squares at each rank: for larger kernels by name only
_CP_SHARES = np.linspace(0.1, GAIN, 8), np.linspace(0.1, 0.55, 4)  # prices that are tried: alone, and beside others
MINIMIZE = ("auto", "flops", "bytes")

_Place = tuple[float, float, tuple[int, ...]]  # price, error by the spectrum, ranks


@dataclasses.dataclass(frozen=True)
class Choice:
    """Factors that a layer may get.

    Attributes:
      method, ranks: which.
      error: noise over signal of the layer.
      macs, elements: what they cost.
    """

    method: str
    ranks: tuple[int, ...]
    error: float
    macs: int
    elements: int


class Options:
    """What a layer may be replaced by, cheapest first, of each method.

    Args:
      layer: which.
      moment: of its inputs, or None.
      methods: that may be used.
      minimize: one of MINIMIZE.
    """

    def __init__(self, layer: Layer, moment: Moment | None, methods: Sequence[str], minimize: str):
        self.layer, self.moment, self.minimize = layer, moment, minimize
        self.several = len(methods) > 1
        self.fronts = {method: self._front(method) for method in methods if method in layer.methods()}
        self._made: dict[tuple[str, tuple[int, ...]], Choice] = {}

    def price(self, macs: int, elements: int) -> float:
        """What is to be made small, as a share of the layer as it is."""
        if self.minimize == "bytes" or self.layer.kind == "lookup":
            return elements / self.layer.elements()
        return macs / max(self.layer.macs(), 1)

    def allowed(self, macs: int, elements: int) -> bool:
        """Whether it is worth while: neither grows, unless one of them does not count."""
        if self.layer.kind == "lookup":  # it has no FLOPs to lower; those of its second factor are few
            return self.minimize != "flops" and elements <= GAIN * self.layer.elements()
        if self.price(macs, elements) > GAIN:
            return False
        return self.minimize != "auto" or (macs <= self.layer.macs() and elements <= self.layer.elements())

    def _front(self, method: str) -> list[_Place]:
        """The ranks that are worth a thought, where a higher price buys a smaller error."""
        inputs, outputs = self.layer.kernel.shape[2:]
        if method == "cp":
            unit = self.price(self.layer.macs("cp", (1,)), self.layer.elements("cp", (1,)))
            ranks = sorted({rounded(share / unit) for share in _CP_SHARES[self.several]})
            found: list[_Place] = [(self._price(method, (r,)), float("nan"), (r,)) for r in ranks if r]
            return [point for point in found if self._allowed(method, point[2])]
        points: list[_Place]
        if method == "tucker":
            kept = factors.tucker_energy(self.layer.kernel, self.moment)
            pairs: list[tuple[int, ...]] = [(r, s) for r in grid(inputs) for s in grid(outputs)]
            points = [(self._price(method, pair), 1 - float(kept[pair]), pair) for pair in pairs]
        else:
            squares = factors.spectrum(self.layer.kernel, method, self.moment)
            tail = _tail(squares) / factors.signal(self.layer.kernel, self.moment)
            singles: list[tuple[int, ...]] = [(r,) for r in grid(len(squares))]
            points = [(self._price(method, each), float(tail[each[0]]), each) for each in singles]
        front: list[_Place] = []
        for point in sorted(points):
            if self._allowed(method, point[2]) and (not front or point[1] < front[-1][1]):
                front.append(point)
        return front

    def _price(self, method: str, ranks: tuple[int, ...]) -> float:
        return self.price(self.layer.macs(method, ranks), self.layer.elements(method, ranks))

    def _allowed(self, method: str, ranks: tuple[int, ...]) -> bool:
        return self.allowed(self.layer.macs(method, ranks), self.layer.elements(method, ranks))

    def choice(self, method: str, point: _Place) -> Choice:
        """A point of a front with its true error."""
        key = method, point[2]
        if key not in self._made:
            error = point[1]
            if method == "cp" or (self.moment is not None and method != "svd"):
                found = factors.decompose(self.layer.kernel, method, point[2], self.moment, quick=True)
                error = factors.error(self.layer.kernel, found, self.moment)
            macs, elements = self.layer.macs(*key), self.layer.elements(*key)
            self._made[key] = Choice(method, point[2], max(error, 0.0), macs, elements)
        return self._made[key]

    def within(self, bound: float) -> Choice:
        """The cheapest with an error of at most `bound`.

        Raises:
          Refused: none that is allowed comes so near.
        """
        best: Choice | None = None
        for method, front in self.fronts.items():
            low, high = 0, len(front)  # the first point whose error is small enough
            while low < high:
                middle = (low + high) // 2
                if self.choice(method, front[middle]).error <= bound:
                    high = middle
                else:
                    low = middle + 1
            if low < len(front):
                found = self.choice(method, front[low])
                if best is None or self._worth(found) < self._worth(best):
                    best = found
        if best is None:
            raise Refused(self.nothing(bound))
        return best

    def _worth(self, choice: Choice) -> tuple[float, float]:
        return self.price(choice.macs, choice.elements), choice.error

    def nothing(self, bound: float) -> str:
        """Why no factors are good enough."""
        found = [self.choice(method, front[-1]).error for method, front in self.fronts.items() if front]
        if not found:
            if self.layer.kind == "lookup" and self.minimize == "flops":
                return "a lookup has no FLOPs to lower"
            return "factors of any rank would cost as much as the layer itself"
        return (
            f"factors that cost less leave an error of {min(found):.2g} of its output or more, beyond the {bound:.2g} "
            "allowed"
        )

    def spread(self) -> list[Choice]:
        """Some of every method, over all prices, none with an error above WORST."""
        found = []
        for method, front in self.fronts.items():
            places = np.linspace(0, len(front) - 1, min(len(front), POINTS if method != "svd" else 40))
            found += [self.choice(method, front[place]) for place in sorted({round(p) for p in places})]
        return [choice for choice in found if choice.error <= WORST]

    def built(self, choice: Choice) -> Factors:
        """The factors of a choice, as good as they get."""
        made = factors.decompose(self.layer.kernel, choice.method, choice.ranks, self.moment)
        if choice.method == "tucker" and self.moment is not None:  # its iterations know the channels, not the patches
            quick = factors.decompose(self.layer.kernel, "tucker", choice.ranks, self.moment, quick=True)
            return min(made, quick, key=lambda each: factors.error(self.layer.kernel, each, self.moment))
        return made


def grid(limit: int) -> list[int]:
    """The ranks that are tried below a limit."""
    return [r for r in range(1, limit) if r < STEP or r % STEP == 0]


def rounded(rank: float) -> int:
    """The nearest rank of the grid, from below."""
    return int(rank) if rank < STEP else int(rank) // STEP * STEP


def vbmf_error(layer: Layer, moment: Moment | None) -> float:
    """The error that remains at the ranks that variational Bayes finds in the kernel."""
    kernel = layer.kernel
    if layer.methods() == ("svd",):
        rank = max(vbmf.rank(kernel.reshape(-1, kernel.shape[-1])), 1)
        return float(_tail(factors.spectrum(kernel, "svd", moment))[rank] / factors.signal(kernel, moment))
    sides = (np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1) for axis in (2, 3))
    ranks = tuple(max(vbmf.rank(side), 1) for side in sides)
    if moment is None:
        return 1 - float(factors.tucker_energy(kernel)[ranks])
    return factors.error(kernel, factors.decompose(kernel, "tucker", ranks, moment, quick=True), moment)


def _tail(squares: np.ndarray) -> np.ndarray:
    """At [r] the sum of all but the r largest."""
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def allot(
    options: Mapping[str, list[Choice]],
    whole: Mapping[str, int],
    harm: Mapping[str, Callable[[float], float]],
    wanted: int,
) -> dict[str, Choice]:
    """Chooses for all layers together, so that multiply-accumulates go and the errors add up to little.

    Args:
      options: layer -> what it may be replaced by.
      whole: layer -> its multiply-accumulates.
      harm: layer -> function from its error to that of the outputs.
      wanted: how many multiply-accumulates are to go.

    Returns:
      Layer -> its choice; layers that stay are left out. All that there is where that is not enough.
    """
    steps = []
    for name, choices in options.items():
        saved = [(whole[name] - choice.macs, harm[name](choice.error), choice) for choice in choices]
        hull = _hull(saved)
        steps += [
            ((b[1] - a[1]) / (b[0] - a[0]), name, number, b)
            for number, (a, b) in enumerate(zip([(0, 0.0, None), *hull], hull, strict=False))
        ]
    chosen: dict[str, Choice] = {}
    gone: dict[str, int] = {}
    for _, name, _, (saved_now, _, step) in sorted(steps, key=lambda each: each[:3]):
        others = sum(count for other, count in gone.items() if other != name)
        if sum(gone.values()) >= wanted:
            break
        enough = [c for c in options[name] if others + whole[name] - c.macs >= wanted]
        # The last step need not be a whole one.
        assert step is not None
        last = min(enough, key=lambda c: (c.error, c.macs), default=step)
        chosen[name] = last if others + saved_now >= wanted else step
        gone[name] = whole[name] - chosen[name].macs
    return chosen


def interpolated(errors: Sequence[float], harms: Sequence[float]) -> Callable[[float], float]:
    """A function through measured points: never falling, straight in logarithms, proportional beyond them.

    Args:
      errors: of a layer, positive.
      harms: of the outputs, at these.
    """
    order = np.argsort(errors)
    x = np.log(np.maximum(np.asarray(errors, np.float64)[order], 1e-12))
    y = np.log(np.maximum(np.maximum.accumulate(np.asarray(harms, np.float64)[order]), 1e-15))

    def harm(error: float) -> float:
        point = float(np.log(max(error, 1e-12)))
        beyond = point - float(np.clip(point, x[0], x[-1]))
        return float(np.exp(np.interp(point, x, y) + beyond))

    return harm


_Point = tuple[int, float, Choice | None]


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The lower convex hull of (saved, error), from (0, 0) on, without that."""
    hull: list[_Point] = [(0, 0.0, None)]
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if point[0] <= 0:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        if point[0] > hull[-1][0]:
            hull.append(point)
        elif point[1] < hull[-1][1]:
            hull[-1] = point
    return hull[1:]


def _slope(a: _Point, b: _Point) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-9)
