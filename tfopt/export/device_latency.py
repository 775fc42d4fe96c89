"""How long the TFLite files of models with fake-quant nodes take, before one of them is chosen."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tfopt import measure
from tfopt.errors import TfoptError
from tfopt.export import saved_model, tflite
from tfopt.export.fake_quant_form import for_converter
from tfopt.export.fixed_batch import fix_batch
from tfopt.model import Model


def device_latency(
    plain: Model, models: Mapping[str, Model], signature: str, inputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Converts models with fake-quant nodes and times their files against each other, each in a process of its own.

    Args:
      plain: the same model without such nodes.
      models: name -> model.
      signature: which is run.
      inputs: one row of it.

    Returns:
      Name -> median milliseconds of a call.

    Raises:
      TfoptError: one of them cannot be converted, or does not run.
    """
    paths: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="tfopt-latency-") as work:
        frozen = Path(work) / "plain"
        saved_model.save(fix_batch(plain, 1), frozen, max_constant_bytes=1 << 31)
        for name, model in models.items():
            quantized, folder = fix_batch(model, 1), Path(work) / name
            for_converter(quantized)
            saved_model.save(quantized, folder / "model", max_constant_bytes=1 << 31)
            (made,) = tflite.convert(frozen, ["mixed"], folder, fake_quantized=folder / "model")
            if made.path is None:
                raise TfoptError(f"{made.error}")
            paths[name] = made.path
        times = measure.latency(paths, signature, inputs)
    for each in times.values():
        if each.p50_ms is None:
            raise TfoptError(f"{each.error}")
    return {name: float(each.p50_ms or 0) for name, each in times.items()}
