"""Converts a SavedModel into a .tflite file by TFLiteConverter, quantized or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfopt import runtime
from tfopt.errors import TfoptError
from tfopt.export.tflite_islands import float_islands
from tfopt.export.tflite_names import shorten
from tfopt.export.tflite_rows import calls


def convert(job: Mapping[str, Any]) -> list[str]:
    """Writes `job["path"]`.

    Args:
        job: see tflite_kinds.Engine; beside `per_channel_dense` and `ranges` (whether the graph has fake-quant nodes)
            the fields `name`, `saved_model`, `signatures`, `rows`, `io_type` and `select`.

    Returns:
        What a reader of the report should know.

    Raises:
        TfoptError: it cannot be converted.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(
        job["saved_model"], signature_keys=job["signatures"], tags=["serve"]
    )
    ops = tf.lite.OpsSet
    converter.target_spec.supported_ops = [ops.TFLITE_BUILTINS]
    name = job["name"]
    if name != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if name == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif name == "dynamic_int8":
        converter._experimental_disable_per_channel_quantization_for_dense_layers = not job["per_channel_dense"]
    elif name != "float32":
        if job["io_type"] == "int8" and name != "int16x8":
            converter.inference_input_type = converter.inference_output_type = tf.int8
        if job.get("ranges"):
            return _write(converter, job)
        rows = calls(job)
        many = len(job["signatures"]) > 1
        converter.representative_dataset = lambda: (
            (key, call) if many else call for key in job["signatures"] for call in rows[key]
        )
        wide = ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        converter.target_spec.supported_ops = [wide if name == "int16x8" else ops.TFLITE_BUILTINS_INT8]
        try:
            return _write(converter, job)
        except TfoptError:
            # An op without an integer kernel: leave it in float. What is left is named from the file itself.
            converter.target_spec.supported_ops += [ops.TFLITE_BUILTINS]
    return _write(converter, job)


def _write(converter: Any, job: Mapping[str, Any]) -> list[str]:
    """Converts and writes the file; returns notes."""
    notes = []
    try:
        content = _run(converter)
    except TfoptError as error:
        if "TensorList" in str(error) and _single_batch(job):
            # Keras gives the states of a recurrent layer an unknown batch, whatever the batch of the input.
            converter._experimental_default_to_single_batch_in_tensor_list_ops = True
            notes = ["unknown dimensions of the states of loops were taken as the batch of 1"]
        elif not job["select"]:
            raise
        if job["select"]:
            import tensorflow as tf

            converter.target_spec.supported_ops += [tf.lite.OpsSet.SELECT_TF_OPS]
        content = _run(converter)
    if job["name"] in ("int8", "int4", "mixed") and not job["all_integer"] and job["io_type"] == "float32":
        content = float_islands(content)
    Path(job["path"]).write_bytes(shorten(content))
    return notes


def _single_batch(job: Mapping[str, Any]) -> bool:
    with runtime.open(job["saved_model"]) as program:
        specs = [spec for key in job["signatures"] for spec in program.signatures[key].inputs.values()]
    return all(spec.shape is not None and spec.shape[:1] in ((), (1,)) for spec in specs)


def _run(converter: Any) -> bytes:
    """Converts, and turns pages of MLIR into the line that matters."""
    try:
        return converter.convert()
    except Exception as error:
        text = str(error)
        for pattern, words in (
            (
                r"TF Select ops: (.+)",
                "no TFLite kernel for {}; allow Select TF ops to run them by the Flex delegate",
            ),
            (r"Custom ops: (.+)", "no kernel for {} in TFLite, nor in its Flex delegate"),
        ):
            if found := re.search(pattern, text):
                ops = ", ".join(sorted({op.strip() for op in found.group(1).split(",")}))
                raise TfoptError(words.format(ops)) from error
        lines = [re.sub(r"loc\(.*?\): |<unknown>:0: |error: ", "", line).strip() for line in text.splitlines()]
        line = next(filter(None, lines), type(error).__name__)
        raise TfoptError(line[:300]) from error
