"""The .tflite files behind the face of runtime.Program; imports no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from tfopt.data import STRING, TensorSpec
from tfopt.errors import TfoptError
from tfopt.runtime import LITERT, PLAIN, NeedsFlexError, Outputs, Program, Signature, one_line


class LiteProgram(Program):
    """A .tflite file; int8 inputs and outputs are converted at its edge."""

    def __init__(self, path: str, threads: int | None):
        super().__init__(path)
        try:
            self.loader, self._interpreter = _load(path, threads)
        except (RuntimeError, ValueError) as error:
            if "Flex delegate" in str(error):
                raise NeedsFlexError(f"{path} does not load: {_reason(error)}") from error
            raise TfoptError(f"{path} does not load: {_reason(error)}") from error
        self._runners: dict[str, Any] = {}
        keys = sorted(self._interpreter.get_signature_list())
        if keys:
            self._runners = {key: self._interpreter.get_signature_runner(key) for key in keys}
            details = {k: (r.get_input_details(), r.get_output_details()) for k, r in self._runners.items()}
        else:
            ends = (self._interpreter.get_input_details(), self._interpreter.get_output_details())
            by_name = [{detail["name"]: detail for detail in end} for end in ends]
            details = {"serving_default": (by_name[0], by_name[1])}
        self._details = details
        self.signatures = {
            key: Signature(
                {name: _lite_spec(name, d) for name, d in sorted(inputs.items())},
                {name: _lite_spec(name, d) for name, d in sorted(outputs.items())},
            )
            for key, (inputs, outputs) in details.items()
        }

    def _bind(self, signature: str, arrays: dict[str, np.ndarray]) -> Callable[[], Outputs]:
        inputs, outputs = self._details[signature]
        values = {name: quantize(array, inputs[name]) for name, array in arrays.items()}
        runner = self._runners.get(signature)
        call = (lambda: runner(**values)) if runner else (lambda: self._invoke(values, inputs, outputs))

        def run() -> Outputs:
            try:
                results = call()
            except (RuntimeError, ValueError) as error:
                raise TfoptError(f"{self.path}: signature '{signature}' cannot run: {_reason(error)}") from error
            return {name: dequantize(results[name], outputs[name]) for name in sorted(results)}

        return run

    def _invoke(self, values: Mapping[str, np.ndarray], inputs: Mapping, outputs: Mapping) -> Outputs:
        """What a signature runner does, for a file that has no signature."""
        interpreter = self._interpreter
        for name, value in values.items():
            interpreter.resize_tensor_input(inputs[name]["index"], value.shape)
        interpreter.allocate_tensors()
        for name, value in values.items():
            interpreter.set_tensor(inputs[name]["index"], value)
        interpreter.invoke()
        return {name: interpreter.get_tensor(detail["index"]) for name, detail in outputs.items()}

    def close(self) -> None:
        """Drops the interpreter."""
        self._runners, self._interpreter = {}, None


def quantize(array: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """Returns `array` as the tensor of a .tflite file wants it: integers of its scale and zero point."""
    scale, zero_point = detail["quantization"]
    if not scale:
        return array
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.rint(array / scale) + zero_point, limits.min, limits.max).astype(detail["dtype"])


def dequantize(array: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `quantize`."""
    scale, zero_point = detail["quantization"]
    return (array.astype(np.float32) - np.float32(zero_point)) * np.float32(scale) if scale else array


def _load(path: str, threads: int | None) -> tuple[str, Any]:
    interpreter = Interpreter(model_path=path, num_threads=threads)
    try:
        interpreter.allocate_tensors()
        return LITERT, interpreter
    except RuntimeError as error:
        if "XNNPack" not in str(error):
            raise
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=path, num_threads=threads, experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    return PLAIN, interpreter


def _reason(error: Exception) -> str:
    if "Flex delegate" in str(error):
        return "it needs the Flex delegate (Select TF ops), which ai_edge_litert does not have"
    return one_line(error)


def _lite_spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    dtype = np.dtype(detail["dtype"])
    shape = tuple(None if size < 0 else int(size) for size in detail["shape_signature"])
    if dtype.kind in "SUO":
        return TensorSpec(name, STRING, shape)
    return TensorSpec(name, np.dtype(np.float32) if detail["quantization"][0] else dtype, shape)
