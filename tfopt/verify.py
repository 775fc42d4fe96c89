"""Equivalence: does a rewritten model give what it gave before, on the same inputs?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt import composite
from tfopt.data import Dataset, TensorSpec, batch_size, load, probes
from tfopt.equivalence import BOUNDS
from tfopt.errors import TfoptError
from tfopt.feature_spec import feature_spec
from tfopt.function import Function
from tfopt.graph import op_def
from tfopt.inline import tensor_names
from tfopt.model import Model
from tfopt.random_inputs import Draw
from tfopt.serving import request

_ROWS = 3  # random rows: enough to show a batch that leaks, few enough for large models
_DATA_ROWS = 16  # real rows
# What to try where a signature leaves shapes and ranges open; the most telling first.
GUESSES: tuple[dict[str, Any], ...] = (
    {"size": 8, "int_high": 10},
    {"size": 8, "int_high": 2},
    {"size": 8, "int_high": 2, "values": (1, 1)},
    {"size": 8, "int_high": 1, "values": (1, 1)},
    {"size": 32, "int_high": 2},
    {"size": 224, "int_high": 2},
    {"unknown_rank": ()},
    {"unknown_rank": (None, 8)},
    {"unknown_rank": (None, 224, 224, 3)},
    {"rows": 1, "size": 1, "int_high": 1},
)

# Stateful ops that give the same from the same state.
_STEADY = ("Placeholder", "PlaceholderWithDefault", "VarHandleOp", "ReadVariableOp", "AssignVariableOp", "HashTableV2")

_CALLS = 2  # a second call shows what state does


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far outputs are apart.

    Attributes:
      absolute: max|a - b| over all float outputs.
      relative: the same over the output's scale, max|a|; the worst output.
      broken: the first output that is beyond its bound, differs though it is no float, or changed its shape; or None.
    """

    absolute: float = 0.0
    relative: float = 0.0
    broken: str | None = None


def difference(expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> Difference:
    """Compares the outputs of one call.

    Args:
      expected: output name -> array of the original.
      received: the same of what is compared with it.
    """
    absolute = relative = 0.0
    broken = None
    for name, a in expected.items():
        b = received.get(name)
        if b is None:
            broken = broken or f"output {name!r} is missing"
            continue
        a, b = (np.asarray(value, object if isinstance(value, bytes) else None) for value in (a, b))
        if a.shape != b.shape or a.dtype != b.dtype:
            broken = broken or f"output {name!r} changed from {a.dtype}{list(a.shape)} to {b.dtype}{list(b.shape)}"
            continue
        bound = BOUNDS.get(a.dtype.name)
        if bound is None:
            if not np.array_equal(a, b):
                broken = broken or f"output {name!r} ({a.dtype}) is not equal in {np.count_nonzero(a != b)} of {a.size}"
            continue
        if not a.size:
            continue
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = np.isfinite(a)
        same_elsewhere = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        if not np.array_equal(finite, np.isfinite(b)) or not same_elsewhere:
            broken = broken or f"output {name!r} differs where it is not finite"
            absolute = relative = float("inf")
            continue
        error = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
        scale = float(np.max(np.abs(a[finite]), initial=0.0))
        ratio = error / scale if scale else (0.0 if error == 0 else float("inf"))
        absolute, relative = max(absolute, error), max(relative, ratio)
        if ratio > bound:
            broken = broken or f"output {name!r} is off by {ratio:.2g} of its scale (bound {bound:g})"
    return Difference(absolute, relative, broken)


def worst(differences: list[Difference]) -> Difference:
    """The worst of several comparisons."""
    return Difference(
        max((d.absolute for d in differences), default=0.0),
        max((d.relative for d in differences), default=0.0),
        next((d.broken for d in differences if d.broken), None),
    )


def input_specs(model: Model, signature: str) -> dict[str, TensorSpec]:
    """Name, dtype and shape of every input of a signature; components of sparse inputs as `name:component`."""
    specs = {}
    for name, info in sorted(model.signatures[signature].inputs.items()):
        for component, tensor in tensor_names(info):
            key = f"{name}:{component}" if component else name
            dtype = tf.as_dtype(model.graph.producer(tensor).attr["dtype"].type or info.dtype)
            shape = None if info.tensor_shape.unknown_rank or component else _dims(info.tensor_shape)
            specs[key] = TensorSpec(key, "string" if dtype == tf.string else np.dtype(dtype.as_numpy_dtype), shape)
    return specs


def _dims(shape: tf.compat.v1.TensorShape) -> tuple[int | None, ...]:
    return tuple(None if d.size < 0 else d.size for d in shape.dim)


def features(model: Model, signature: str) -> dict | None:
    """The tf.Example features of a signature whose one input is serialized examples; None for others."""
    inputs = model.signatures[signature].inputs
    if len(inputs) != 1:
        return None
    return feature_spec(model.graph, next(iter(inputs.values())).name) or None


def inputs_for(model: Model, data: str | None, seed: int, run: Callable[[str, dict], object]) -> dict[str, Dataset]:
    """Inputs to compare every signature on.

    Args:
      model: the model.
      data: a source of representative data (see `data.load`), used for the signatures that it fits; None draws probes.
      seed: of the probes.
      run: calls the original, to see which inputs it accepts: unknown dimensions and index ranges are guesses.

    Returns:
      Signature -> rows.

    Raises:
      TfoptError: the data fits no signature, or a signature accepts nothing that was tried.
    """
    chosen: dict[str, Dataset] = {}
    misfits: list[TfoptError] = []
    for name in model.signatures:
        specs = input_specs(model, name)
        if data:
            try:
                rows = batch_size(specs, _DATA_ROWS)
                chosen[name] = load(data, specs, feature_spec=features(model, name), limit=rows)
                continue
            except TfoptError as error:
                misfits.append(error)
        chosen[name] = _accepted(model, name, specs, seed, run)
    if data and len(misfits) == len(model.signatures):
        raise misfits[0]
    return chosen


def _accepted(
    model: Model, signature: str, specs: dict[str, TensorSpec], seed: int, run: Callable[[str, dict], object]
) -> Dataset:
    spec, definition = features(model, signature), model.signatures[signature]
    failure: TfoptError | None = None
    for guess in GUESSES:
        guess = {"rows": _ROWS, **guess}
        dataset = probes(specs, seed, feature_spec=spec, **guess)
        if whole := composite.names(definition):
            draw = Draw(np.random.default_rng(seed), guess.get("int_high", 10))
            dtypes = {key: wanted.dtype for key, wanted in specs.items()}
            parts = composite.probes(definition, dtypes, draw, guess["rows"], guess.get("size", 8))
            dataset = Dataset({**dataset.inputs, **parts}, None, dataset.source, dataset.whole | whole)
        try:
            run(signature, dataset.inputs)
            return dataset
        except TfoptError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _may_vary(model: Model) -> bool:
    """Whether a model has an op that could give something else at the next call."""
    bodies = [model.graph.nodes.values(), *(function.node_def for function in model.library())]
    for node in (node for body in bodies for node in body):
        definition = op_def(node.op)
        if definition is None or (definition.is_stateful and node.op not in _STEADY):
            return True
    return False


class Verifier:
    """Compares models with the one that it was made for, on fixed inputs.

    Attributes:
      inputs: signature -> rows on which it is run.
      expected: signature -> the outputs of the original, call by call.
      random: signatures that give something else at each call; they are not compared.
      last: the difference of the last model that was right.
    """

    def __init__(self, model: Model, data: str | None, seed: int, once: Sequence[str] = ()):
        """Runs the original.

        Args:
          model: the original.
          data: a source of representative data, or None for seeded probes.
          seed: of the probes.
          once: globs of inputs, or features of tf.Examples, in which all rows are to agree.

        Raises:
          TfoptError: the original cannot be run.
        """
        with Function(model) as function:
            self.inputs = inputs_for(model, data, seed, function)
        if once:
            self.inputs = {name: request.aligned(rows, once) for name, rows in self.inputs.items()}
        self.expected = self._outputs(model)
        self.random: list[str] = []
        self.last = Difference()  # of the last model that was right
        if _may_vary(model):
            again = self._outputs(model)
            for name, calls in list(self.expected.items()):
                if self._compare({name: calls}, {name: again[name]}).broken:
                    self.random.append(name)
                    del self.expected[name]

    def check(self, model: Model) -> Difference:
        """Runs a rewritten model on the same inputs.

        Returns:
          The worst difference over all signatures and calls. A model that cannot be run is broken.
        """
        try:
            received = self._outputs(model)
            expected = {name: self.expected.get(model.stands_for.get(name, name)) for name in received}
            found = self._compare({name: calls for name, calls in expected.items() if calls}, received)
        except TfoptError as error:
            return Difference(float("inf"), float("inf"), str(error))
        if not found.broken:
            self.last = found
        return found

    def between(self, before: Model, after: Model) -> Difference:
        """Compares two rewritten models, where one before them has changed outputs on purpose.

        Raises:
          TfoptError: one of them cannot be run.
        """
        old, new = self._outputs(before), self._outputs(after)
        names = [name for name in old if name in new and before.stands_for.get(name, name) in self.expected]
        return self._compare({name: old[name] for name in names}, new)

    def _outputs(self, model: Model) -> dict[str, list[dict[str, np.ndarray]]]:
        """Signature -> outputs of successive calls, each signature from a fresh state."""
        outputs: dict[str, list[dict[str, np.ndarray]]] = {}
        stateful = bool(model.state)
        function = Function(model)
        for name in [*self.inputs, *model.stands_for]:
            if stateful and outputs:
                function.close()
                function = Function(model)
            rows = self.inputs[model.stands_for.get(name, name)].inputs
            outputs[name] = [function(name, rows) for _ in range(_CALLS if stateful else 1)]
        function.close()
        return outputs

    @staticmethod
    def _compare(expected: Mapping[str, list], received: Mapping[str, list]) -> Difference:
        return worst(
            [difference(a, b) for name, calls in expected.items() for a, b in zip(calls, received[name], strict=True)]
        )
