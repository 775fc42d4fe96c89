"""The child's side of tflite.py: each task makes or examines one file, and may abort without harm to the others."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import runtime
from tfopt.errors import TfoptError
from tfopt.export import tflite_aliases
from tfopt.export.tflite_names import shorten

_PROBE_ROWS = 2
_COMPARED_CALLS = 64
_OLD_RUNTIME = (2, 14, 0)  # the last tflite-runtime


def worker() -> Callable[[dict[str, Any]], Any]:
    """Returns the function that answers requests: a dict with `task` and the task's own fields (see tflite.py)."""
    tasks = {
        "signatures": _signatures,
        "alias": _alias,
        "convert": _convert,
        "quantize": _quantize,
        "examine": _examine,
    }

    def answer(job: dict[str, Any]) -> Any:
        try:
            return tasks[job["task"]](job)
        except TfoptError as error:
            folder = str(Path(job["path"]).parent) if "path" in job else ""
            raise TfoptError(str(error).replace(f"{folder}/", "")) from error
        except Exception as error:
            if "Flex delegate" in str(error):
                raise TfoptError("calibration needs the Flex delegate (Select TF ops), which is not here") from error
            raise TfoptError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    return answer


def _signatures(job: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns the input names of each signature that is to be converted, and the aliases of these."""
    aliases = tflite_aliases.find(job["saved_model"])
    with runtime.open(job["saved_model"]) as program:
        found = {key: sorted(each.inputs) for key, each in program.signatures.items() if key not in aliases}
    return found, aliases


def _alias(job: Mapping[str, Any]) -> None:
    tflite_aliases.add(job["path"], job["aliases"])


def _convert(job: Mapping[str, Any]) -> list[str]:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(
        job["saved_model"], signature_keys=job["signatures"], tags=["serve"]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if job["name"] != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if job["name"] == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif job["name"] == "dynamic_int8":
        # Per channel, a dense layer becomes FULLY_CONNECTED version 12, which runtimes before TF 2.17 cannot load.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = not job["per_channel_dense"]
    elif job["name"] == "int8":
        rows = _rows(job)
        many = len(job["signatures"]) > 1
        converter.representative_dataset = lambda: (
            (key, call) if many else call for key in job["signatures"] for call in rows[key]
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if job["io_type"] == "int8":
            converter.inference_input_type = converter.inference_output_type = tf.int8
        try:
            return _write(converter, job)
        except TfoptError:
            # An op without an integer kernel: leave it in float. What is left is named from the file itself.
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
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


def _quantize(job: Mapping[str, Any]) -> list[str]:
    from litert_quantizer import qtyping, quantizer, recipe

    quantization = quantizer.Quantizer(job["float32"])
    quantization.load_quantization_recipe(recipe.static_wi8_ai8())
    if job["io_type"] == "float32":
        for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            quantization.update_quantization_recipe(".*", end, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
    rows = _rows(job)
    ranges = quantization.calibrate({key: rows[key] for key in job["signatures"]}, num_threads=1)
    Path(job["path"]).write_bytes(shorten(bytes(quantization.quantize(ranges).quantized_model)))
    return []


def _examine(job: Mapping[str, Any]) -> dict[str, Any]:
    """Loads and runs a file, and compares it with float32.

    Returns:
        quantized: number of weights that are int8 or float16. float_ops: name -> number. snr: in dB, of the worst
        output, None without data. rows: on how many. notes: the rest.
    """
    model = _Flatbuffer(job["path"])
    facts: dict[str, Any] = {"quantized": model.quantized_weights(), "float_ops": model.float_ops(), "snr": None}
    facts["rows"], facts["notes"] = 0, []
    if (needed := model.min_runtime()) > _OLD_RUNTIME:
        facts["notes"] = [f"needs TFLite {'.'.join(map(str, needed))} or newer: tflite-runtime 2.14 cannot load it"]
    if flex := model.select_ops():
        facts["notes"] += [
            f"needs the Flex delegate for {', '.join(flex)}; not run here, since ai_edge_litert has none"
        ]
        return facts
    # Fewer than for calibration: a ratio settles sooner than the extremes of a range.
    rows = {key: calls[:: -(-len(calls) // _COMPARED_CALLS) or 1] for key, calls in _rows(job).items()}
    facts["rows"] = sum(map(len, rows.values()))
    ratios = []
    with runtime.open(job["path"]) as made, runtime.open(job["float32"]) as base:
        if made.loader == runtime.PLAIN:
            facts["notes"].append(
                "the XNNPACK delegate of ai_edge_litert cannot prepare it; it runs without, and slower"
            )
        for key in job["signatures"]:
            if made.signatures[key].inputs.keys() != base.signatures[key].inputs.keys():
                raise TfoptError(f"signature '{key}' lost inputs: it has {sorted(made.signatures[key].inputs)}")
            sums: dict[str, np.ndarray] = {}
            for call in rows[key] if key in rows else _probes(base.signatures[key]):
                wants, gots = base.run(key, call), made.run(key, call)
                for name, want in wants.items():
                    if want.dtype.kind == "f":
                        sums[name] = sums.get(name, 0) + _signal_and_noise(want, gots[name])
            if key not in rows:
                continue  # random inputs show that the file runs, and no more than that
            for name, (signal, noise) in sums.items():
                if not np.isfinite(signal):
                    facts["notes"].append(f"output '{name}' of signature '{key}' is not finite, in float32 already")
                elif not np.isfinite(noise):
                    raise TfoptError(f"output '{name}' of signature '{key}' is not finite")
                else:
                    ratios.append(float(10 * np.log10(signal / noise)) if noise else float("inf"))
    if ratios and job["name"] != "float32":
        facts["snr"] = min(ratios)
    return facts


def _signal_and_noise(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    want, got = want.astype(np.float64), got.astype(np.float64)
    return np.array([np.sum(want**2), np.sum((want - got) ** 2)])


def _rows(job: Mapping[str, Any]) -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns the representative data as calls of each signature: one fixed batch, or one row, at a time."""
    stored = pickle.loads(Path(job["rows"]).read_bytes())
    with runtime.open(job["float32"]) as program:
        # What has no inputs needs no data.
        stored |= {key: ({}, frozenset()) for key, value in program.signatures.items() if not value.inputs}
        return {
            key: list(_calls(stored[key][0], stored[key][1], program.signatures[key]))
            for key in job["signatures"]
            if key in stored
        }


def _calls(
    inputs: Mapping[str, np.ndarray], whole: frozenset[str], signature: runtime.Signature
) -> Iterator[dict[str, np.ndarray]]:
    by_row = [name for name in inputs if name not in whole]
    shapes = [signature.inputs[name].shape for name in by_row]
    size = max((shape[0] or 1 for shape in shapes if shape), default=1)
    total = len(inputs[by_row[0]]) if by_row else 1
    for start in range(0, max(total - size, 0) + 1, size):
        call = {name: array if name in whole else array[start : start + size] for name, array in inputs.items()}
        yield {
            name: array if array.dtype == object else np.asarray(array, signature.inputs[name].dtype)
            for name, array in call.items()
        }


def _probes(signature: runtime.Signature) -> list[dict[str, np.ndarray]]:
    """Returns calls that show whether a file runs at all."""
    random = np.random.default_rng(0)
    calls = []
    for _ in range(_PROBE_ROWS):
        call = {}
        for name, spec in signature.inputs.items():
            shape = [size or 1 for size in spec.shape or ()]
            if spec.dtype == "string":
                call[name] = np.full(shape, b"", object)
            else:
                call[name] = random.uniform(0, 1, shape).astype(spec.dtype)
        calls.append(call)
    return calls


class _Flatbuffer:
    """What the interpreter does not tell about a file."""

    def __init__(self, path: str):
        from ai_edge_litert import schema_py_generated as schema

        self._schema = schema
        self._model = schema.ModelT.InitFromPackedBuf(Path(path).read_bytes(), 0)

    def quantized_weights(self) -> int:
        types = {self._schema.TensorType.INT8, self._schema.TensorType.FLOAT16, self._schema.TensorType.INT4}
        return sum(
            tensor.type in types and self._model.buffers[tensor.buffer].data is not None
            for subgraph in self._model.subgraphs
            for tensor in subgraph.tensors
        )

    def float_ops(self) -> dict[str, int]:
        """Returns the ops that compute in float; QUANTIZE and DEQUANTIZE only change the type at the edges."""
        names = {value: key for key, value in vars(self._schema.BuiltinOperator).items() if not key.startswith("_")}
        floats = {self._schema.TensorType.FLOAT32, self._schema.TensorType.FLOAT16}
        found: Counter[str] = Counter()
        for subgraph in self._model.subgraphs:
            for op in subgraph.operators or []:
                code = self._model.operatorCodes[op.opcodeIndex]
                name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
                ends = [i for end in (op.inputs, op.outputs) if end is not None for i in end if i >= 0]
                if name not in ("QUANTIZE", "DEQUANTIZE") and any(subgraph.tensors[i].type in floats for i in ends):
                    found[name if name != "CUSTOM" else code.customCode.decode()] += 1
        return dict(sorted(found.items()))

    def min_runtime(self) -> tuple[int, ...]:
        """Returns the version that the converter found its ops to need."""
        for entry in self._model.metadata or []:
            if entry.name == b"min_runtime_version":
                text = bytes(self._model.buffers[entry.buffer].data).split(b"\0")[0].decode()
                return tuple(int(part) for part in text.split(".") if part.isdigit())
        return ()

    def select_ops(self) -> list[str]:
        codes = {(code.customCode or b"").decode() for code in self._model.operatorCodes}
        return sorted(code.removeprefix("Flex") for code in codes if code.startswith("Flex"))
