"""Which layers get how many bits: the least cost whose drop is within a bar, by few evaluations.

    order     (e_L(b) - e_L(b')) / (c_L(b') - c_L(b))     error gone per cost come, from b bits to the next b'

e_L is what a layer brings on its own; the drop of a whole choice is evaluated. Were the drop a function of the sum of
the errors, restoring layers in this order would be the greedy solution of the knapsack problem; so the number of
restored layers is bisected, and what this order has wrong is mended by lowering layers again one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

FLOAT = 32


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose bits are chosen.

    Attributes:
      name: of the layer.
      size: number of its weights.
      errors: bits -> noise over signal that it brings to the outputs; float brings none.
      weight: how much the cost counts that a bit of one of its weights has: 1 where bytes are the cost.
    """

    name: str
    size: int
    errors: Mapping[int, float]
    weight: float = 1.0

    def bytes(self, bits: int) -> int:
        """Bytes of its weights."""
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      bits: layer -> bits.
      drop: of this choice.
      met: whether it is within the bar; where not, this is the least drop that was seen.
      uniform: bits -> the drop with these everywhere, as far as that was evaluated.
      evaluations: how many choices were.
      stopped: whether their limit ended the search.
    """

    bits: dict[str, int]
    drop: float
    met: bool
    uniform: dict[int, float]
    evaluations: int
    stopped: bool


def search(
    layers: Sequence[Layer],
    drop: Callable[[Mapping[str, int]], float],
    bar: float,
    widths: Sequence[int] = (4, 8),
    limit: int = 40,
) -> Found:
    """Searches for the least cost within the bar.

    Args:
      layers: at least one.
      drop: how much a choice (layer -> bits) loses; NaN counts as too much.
      bar: how much it may.
      widths: bits to choose from, ascending.
      limit: of the evaluations; those at the ends and of the bisection are always made.
    """
    seen: dict[tuple[int, ...], float] = {}
    names = [layer.name for layer in layers]

    def evaluate(bits: Mapping[str, int]) -> float:
        key = tuple(bits[name] for name in names)
        if key not in seen:
            found = drop(bits)
            seen[key] = found if found == found else float("inf")
        return seen[key]

    order = [step for low, high in itertools.pairwise(widths) for step in _ordered(layers, low, high)]

    def restored(count: int) -> dict[str, int]:
        return {**dict.fromkeys(names, widths[0]), **{name: bits for name, _, bits in order[:count]}}

    # The first width that is enough everywhere, and how many steps before it are.
    uniform: dict[int, float] = {}
    met = False
    while not met and len(uniform) < len(widths):
        bits = widths[len(uniform)]
        uniform[bits] = evaluate(dict.fromkeys(names, bits))
        met = uniform[bits] <= bar
    if met:
        enough = (len(uniform) - 1) * len(layers)
        too_few = enough - len(layers)
        while enough - too_few > 1 and enough:
            middle = (enough + too_few) // 2
            if evaluate(restored(middle)) <= bar:
                enough = middle
            else:
                too_few = middle
        chosen = restored(enough)
        # The last step cannot be taken back: the bisection has seen that.
        for name, low, high in reversed(order[: max(enough - 1, 0)]):
            if len(seen) >= limit:
                break
            if chosen[name] == high and evaluate({**chosen, name: low}) <= bar:
                chosen[name] = low
    else:
        best = min(seen, key=lambda key: (seen[key], _cost(layers, key)))
        chosen = dict(zip(names, best, strict=True))
    return Found(chosen, evaluate(chosen), met, uniform, len(seen), len(seen) >= limit)


def _ordered(layers: Sequence[Layer], low: int, high: int) -> list[tuple[str, int, int]]:
    """The steps from one width to the next, what gains most for its cost first."""

    def gain(layer: Layer) -> float:
        gone = layer.errors.get(low, 0.0) - layer.errors.get(high, 0.0)
        return gone / max(layer.weight * layer.size * (high - low), 1e-30)

    return [(layer.name, low, high) for layer in sorted(layers, key=gain, reverse=True)]


def _cost(layers: Sequence[Layer], bits: Sequence[int]) -> float:
    return sum(layer.weight * layer.size * b for layer, b in zip(layers, bits, strict=True))
