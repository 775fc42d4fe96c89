"""Groups of channels, what a model costs with some of them gone, and their removal.

macs = sum_p base_p prod_a n_a / N_a        over the products p, and the axes a of each (n of N channels are left)
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from tfopt.channels.ids import Classes
from tfopt.channels.spread import Spread
from tfopt.errors import TfoptError
from tfopt.graph import infer_shapes, join
from tfopt.model import Model
from tfopt.rewrite import Log

# In multiply-accumulates of a matrix product: one of a depthwise convolution, and an element that is written.
_DEPTHWISE, _ELEMENT = 5, 8


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels beside each other in the same tensors: the outputs of a layer, or of all layers of a residual stream.

    Attributes:
      name: of the first layer that makes them.
      classes: the class of each channel.
      entries: the axes of constants that hold them.
      width: how many places of an axis one channel takes at least: the channels of an attention head are one.
    """

    name: str
    classes: np.ndarray
    entries: tuple[tuple[str, int], ...]
    width: int


class Channels:
    """The channels of a model that may go.

    Attributes:
      spread: where they are.
      classes: which go together.
      groups: those that can be cut, in the order of the computation.
    """

    def __init__(self, model: Model, log: Log | None = None, rule: str = "channels"):
        """Finds them.

        Args:
          model: stays as it is.
          log: gets the layers none of whose channels can go, and why, as refusals of `rule`.
          rule: for the log.
        """
        self.spread = Spread(model)
        self.classes: Classes = self.spread.ids.classes()
        self._axes = {
            (name, axis): self.classes.of(ids)
            for name, axes in self.spread.constants.items()
            for axis, ids in enumerate(axes)
        }
        tensors = {axis.tobytes(): axis for axes in self.spread.tensors() for axis in map(self.classes.of, axes)}
        self._tensors = [axis for axis in tensors.values() if axis.size and self.classes.free[axis].all()]
        self.groups = self._groups()
        self._factors = [
            (product.macs, [self.classes.of(axis) for axis in product.axes if axis.ndim])
            for product in self.spread.products
        ]
        self._written = []
        for product in self.spread.products:
            axes, shape = self.spread.axes(product.node) or (), self.spread.shape(product.node) or ()
            classes = [self.classes.of(axis) for axis in axes if axis.ndim]
            self._written.append((_ELEMENT * math.prod(size or 1 for size in shape), classes))
        if log is not None:
            log.refused.update({(rule, node): reason for node, reason in self.spread.unknown.items()})
            for product in self.spread.products:
                if product.makes is not None:
                    found = self.classes.of(product.makes)
                    if len(found) > 1 and not self.classes.free[found].any():
                        log.refused[rule, product.node] = self.classes.reasons[int(found[0])]

    def axis(self, name: str, axis: int) -> np.ndarray:
        """The class of each index of an axis of a constant."""
        return self._axes[name, axis]

    def everything(self) -> np.ndarray:
        """A mask over the classes that keeps all."""
        return np.ones(self.classes.total, bool)

    def macs(self, kept: np.ndarray) -> float:
        """Multiply-accumulates at batch 1 when some classes are gone; lookups cost none."""
        return _sum(self._factors, kept)

    def time(self, kept: np.ndarray) -> float:
        """A rough measure of the time that is left when some classes are gone (see the top)."""
        depthwise = [(_DEPTHWISE * base if len(axes) == 1 else base, axes) for base, axes in self._factors]
        return _sum(depthwise, kept) + _sum(self._written, kept)

    def parameters(self, kept: np.ndarray) -> int:
        """Elements of float constants when some classes are gone."""
        total = 0
        for name, axes in self.spread.constants.items():
            if axes:
                total += int(np.prod([np.count_nonzero(kept[self._axes[name, a]]) for a in range(len(axes))]))
        return total

    def spare(self, kept: np.ndarray, worth: np.ndarray) -> np.ndarray:
        """A mask under which every axis of every tensor keeps a channel: that of most worth where none would stay."""
        kept = kept.copy()
        for classes in self._tensors:
            if not kept[classes].any():
                kept[classes[np.argmax(worth[classes])]] = True
        return kept

    def cut(self, model: Model, kept: np.ndarray) -> int:
        """Takes channels out of a model, in place.

        Args:
          model: the one that this was made of, unchanged.
          kept: mask over the classes.

        Returns:
          How many constants became smaller.

        Raises:
          TfoptError: the shapes that are left do not fit; the model is then spoilt.
        """
        graph, spread = model.graph, self.spread
        assert graph is spread.graph
        for edit in spread.cuts:
            edit(lambda ids: kept[self.classes.of(ids)])
        changed = 0
        for name, axes in spread.constants.items():
            masks = [kept[self._axes[name, axis]] for axis in range(len(axes))]
            if all(mask.all() for mask in masks):
                continue
            value = graph.constant(name)
            assert value is not None
            for axis, mask in enumerate(masks):
                if not mask.all():
                    value = np.compress(mask, value, axis=axis)
            graph.set_constant(name, value)
            changed += 1
        self._check(model, kept)
        return changed

    def _check(self, model: Model, kept: np.ndarray) -> None:
        """Compares the shapes that TensorFlow infers with those that the masks predict."""
        try:
            found = infer_shapes(model.graph, model.library())
        except ValueError as error:
            raise TfoptError(f"channels cannot be cut: {str(error).splitlines()[0]}") from error
        for node in model.graph.nodes.values():
            axes, shape = self.spread.axes(node.name), found.get(join(node.name))
            if axes is None or shape is None:
                continue
            wanted = [int(np.count_nonzero(kept[self.classes.of(ids)])) if ids.ndim else None for ids in axes]
            if any(None not in (a, b) and a != b and a != 1 for a, b in zip(wanted, shape, strict=True)):
                raise TfoptError(f"channels cannot be cut: {node.op} {node.name!r} is {list(shape)}, not {wanted}")

    def _groups(self) -> list[Group]:
        members: dict[int, dict[tuple[str, int], int]] = {}
        for entry, classes in self._axes.items():
            found, counts = np.unique(classes[self.classes.free[classes]], return_counts=True)
            for one, count in zip(found.tolist(), counts.tolist(), strict=True):
                members.setdefault(one, {})[entry] = count
        together: dict[tuple[tuple[tuple[str, int], int], ...], list[int]] = {}
        for one, held in members.items():
            together.setdefault(tuple(held.items()), []).append(one)
        made: dict[int, str] = {}
        for product in self.spread.products:
            if product.makes is not None:
                for one in self.classes.of(product.makes).tolist():
                    made.setdefault(one, product.node)
        order = {product.node: index for index, product in enumerate(self.spread.products)}
        groups = []
        for key, alike in together.items():
            if len(alike) > 1:  # the last one stays
                name = made.get(alike[0], key[0][0][0])
                entries = tuple(entry for entry, _ in key)
                groups.append(Group(name, np.array(sorted(alike)), entries, min(count for _, count in key)))
        groups.sort(key=lambda group: order.get(group.name, len(order)))
        seen: collections.Counter[str] = collections.Counter()
        for index, group in enumerate(groups):
            seen[group.name] += 1
            if seen[group.name] > 1:
                groups[index] = dataclasses.replace(group, name=f"{group.name} #{seen[group.name]}")
        return groups


def _sum(factors: Iterable[tuple[int, list[np.ndarray]]], kept: np.ndarray) -> float:
    share = kept.astype(np.float64)
    return sum(base * float(np.prod([share[axis].mean() for axis in axes])) for base, axes in factors)


def masked(channels: Channels, model: Model, kept: np.ndarray) -> Mapping[str, np.ndarray]:
    """Weights of the same shapes that give what the cut model gives: those that read channels that go are zero.

    Channels that no weight reads are made zero instead.
    """
    gone = ~kept
    found: dict[str, np.ndarray] = {}
    read = {
        one
        for (name, axis), role in channels.spread.roles.items()
        if role == "reads"
        for one in channels.axis(name, axis).tolist()
    }
    for (name, axis), role in channels.spread.roles.items():
        classes = channels.axis(name, axis)
        mask = gone[classes]
        if role == "makes":
            mask &= ~np.isin(classes, list(read))
        if not mask.any() or role not in ("reads", "makes"):
            continue
        value = found.get(name)
        if value is None:
            original = model.graph.constant(name)
            assert original is not None
            value = np.array(original)
        shape = [-1 if a == axis else 1 for a in range(value.ndim)]
        found[name] = np.where(mask.reshape(shape), 0, value).astype(value.dtype)
    return found
