"""Batching in the graph, for a signature whose inputs do not share dimension 0.

    stacked(x, y)_b = f(x_b, y_b)                 x: (b, *shape of x), y: (b, *shape of y)
    served(x, y)    = BatchFunction(stacked)(x[None], y[None])[0]

Requests can be put together along a new first axis where all their inputs have the same shapes, so every shape has to
be known: 200 candidates, and not any number of them. f is frozen first: a batch function that reads variables would
pass each of them through the batcher. The map over b is vectorized (pfor), so that its products are those of larger
matrices; an op that cannot be vectorized is an error and no loop, since a loop over requests gains nothing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt.errors import TfoptError, one_line
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.tuning import tune as tuning
from tfopt.serving.tuning.choice import Workload

_BATCH = 3  # requests that are compared before anything is written
_TOLERANCE = 1e-4  # of the scale of an output: larger matrices are summed in another order


def tune(model: Path, workload: Workload, output: Path, *, signature: str, **options: Any) -> tuning.Tuning:
    """Tunes batching for stacked requests, and writes the model that batches them in its graph.

    Args:
      model: SavedModel directory, or one whose numbered directories are versions.
      workload: its rows count requests, so they have to be 1.
      output: SavedModel directory to write; not written where batching is to be left off.
      signature: which is asked; all its inputs have known shapes.
      options: of `tuning.tune`; the rows of `source` are requests.

    Raises:
      TfoptError: as `tuning.tune` and `write_batched`.
    """
    if workload.rows != 1:
        raise TfoptError("--in_graph: puts whole requests together; drop --rows_per_request")
    directory = tuning.version_directory(model)
    with tempfile.TemporaryDirectory(prefix="tfopt-in-graph-") as folder:
        stacked = Path(folder) / "stacked"
        write_stacked(directory, signature, stacked)
        found = dataclasses.replace(tuning.tune(stacked, workload, signature=signature, **options), model=str(model))
    if found.parameters is not None:
        write_batched(directory, signature, found.parameters, output)
    return found


def write_stacked(model: Path, signature: str, output: Path) -> None:
    """Writes a SavedModel whose signature takes whole requests along a new first axis.

    Args:
      model: SavedModel directory.
      signature: which; all its inputs have known shapes.
      output: a directory that does not exist.

    Raises:
      TfoptError: a shape is open, or the signature cannot be frozen or vectorized.
    """
    function, specs = _stacked(model, signature)
    by_name = tf.function(lambda **inputs: function(*(inputs[name] for name in specs)))
    stacked = by_name.get_concrete_function(
        **{n: tf.TensorSpec((None, *s.shape), s.dtype, name=n) for n, s in specs.items()}
    )
    tf.saved_model.save(tf.Module(), str(output), signatures={signature: stacked})


def write_batched(model: Path, signature: str, parameters: BatchingParameters, output: Path) -> None:
    """Writes a SavedModel with the signature as it was, which batches concurrent requests in its graph.

    Args:
      model: SavedModel directory.
      signature: which; all its inputs have known shapes.
      parameters: as for stacked requests: a batch of b is b requests.
      output: a directory that does not exist.

    Raises:
      TfoptError: as `write_stacked`, or outputs that are not those of the original.
    """
    function, specs = _stacked(model, signature)
    p = parameters.filled()
    names: list[str] = []

    def listed(*inputs: Any) -> list[Any]:
        outputs = function(*inputs)
        names[:] = sorted(outputs)
        return [outputs[name] for name in names]

    batched = tf.nondifferentiable_batch_function(
        num_batch_threads=p.num_batch_threads,
        max_batch_size=p.max_batch_size,
        batch_timeout_micros=p.batch_timeout_micros,
        allowed_batch_sizes=list(p.allowed_batch_sizes) or None,
        max_enqueued_batches=p.max_enqueued_batches,
        enable_large_batch_splitting=False,
    )(listed)

    def serve(**inputs: Any) -> dict[str, Any]:
        # The batch function is traced for the shapes that it is given: the first dimension must look open.
        open_ended = [
            tf.compat.v1.placeholder_with_default(inputs[name][None], [None, *spec.shape])
            for name, spec in specs.items()
        ]
        outputs = batched(*open_ended)
        return {name: output[0] for name, output in zip(names, outputs, strict=True)}

    served = tf.function(serve).get_concrete_function(
        **{name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in specs.items()}
    )
    tf.saved_model.save(tf.Module(), str(output), signatures={signature: served})


def _stacked(model: Path, signature: str) -> tuple[Callable[..., dict[str, Any]], dict[str, tf.TensorSpec]]:
    """The vectorized function of frozen weights, compared with the original; and the inputs of a request, in order."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    loaded = tf.saved_model.load(str(model))
    if signature not in loaded.signatures:
        have = ", ".join(sorted(loaded.signatures))
        raise TfoptError(f"--signature_name={signature}: {model} has no such signature; it has: {have}")
    original = loaded.signatures[signature]
    wanted = original.structured_input_signature[1]
    for name, spec in sorted(wanted.items()):
        if not spec.shape.is_fully_defined():
            raise TfoptError(
                f"--in_graph: input {name!r} of signature {signature!r} has shape {spec.shape}, and requests of "
                "different shapes cannot be put together; export it with known shapes, or leave batching off"
            )
    try:
        frozen = convert_variables_to_constants_v2(original)
        order = [tensor.name.split(":")[0].removeprefix(f"{signature}_") for tensor in frozen.inputs]
        specs = {name: wanted[name] for name in order}
        outputs = sorted(original.structured_outputs)

        def one(row: tuple[Any, ...]) -> dict[str, Any]:
            answer = frozen(*row)
            return dict(zip(outputs, answer, strict=True)) if not isinstance(answer, dict) else answer

        def stacked(*inputs: Any) -> dict[str, Any]:
            return tf.vectorized_map(one, inputs, fallback_to_while_loop=False)

        random = np.random.default_rng(0)
        rows = [_random(random, (_BATCH, *spec.shape), spec.dtype) for spec in specs.values()]
        together = tf.function(stacked)(*rows)
        alone = [original(**{n: row[b] for n, row in zip(specs, rows, strict=True)}) for b in range(_BATCH)]
    except (tf.errors.OpError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise TfoptError(f"--in_graph: signature {signature!r} cannot be batched: {one_line(error)}") from error
    for name in outputs:
        one_by_one = np.stack([answer[name].numpy() for answer in alone])
        if not np.allclose(together[name], one_by_one, rtol=0, atol=_TOLERANCE * max(1e-9, np.abs(one_by_one).max())):
            raise TfoptError(f"--in_graph: output {name!r} of requests together is not that of each alone")
    return stacked, specs


def _random(random: np.random.Generator, shape: tuple[int, ...], dtype: tf.DType) -> tf.Tensor:
    values = random.standard_normal(shape) if dtype.is_floating else random.integers(0, 2, shape)
    return tf.constant(values.astype(dtype.as_numpy_dtype))
