"""Parameters and floating-point operations of a .tflite file, read from its flatbuffer without TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfopt.cost import Cost, Count, product
from tfopt.errors import TfoptError


def tflite_cost(path: str | Path, signature: str = "serving_default") -> Cost:
    """Counts one signature of a .tflite file; the parameters are those of the whole file."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromPackedBuf(Path(path).read_bytes(), 0)
    except Exception as error:
        raise TfoptError(f"{path} is not a .tflite file: {error}") from error
    subgraphs = {each.signatureKey.decode(): each.subgraphIndex for each in model.signatureDefs or []}
    if subgraphs and signature not in subgraphs:
        raise TfoptError(f"{path} has no signature '{signature}'; it has: {', '.join(sorted(subgraphs))}")
    floats = {schema.TensorType.FLOAT16, schema.TensorType.FLOAT32, schema.TensorType.FLOAT64}
    weights = {}  # by buffer: signatures share them
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            buffer = model.buffers[tensor.buffer]
            stored = buffer.size if buffer.data is None else len(buffer.data)
            quantized = tensor.quantization is not None and tensor.quantization.scale is not None
            if stored and _lite_shape(tensor) and (tensor.type in floats or quantized):
                weights[tensor.buffer] = math.prod(_lite_shape(tensor))
    count = Count()
    names = {value: key for key, value in vars(schema.BuiltinOperator).items() if not key.startswith("_")}
    _count_subgraph(model, subgraphs.get(signature, 0), names, count)
    return count.cost(sum(weights.values()))


def _count_subgraph(model: Any, index: int, names: Mapping[int, str], count: Count) -> None:
    subgraph = model.subgraphs[index]
    for op in subgraph.operators or []:
        code = model.operatorCodes[op.opcodeIndex]
        name = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
        shapes = [_lite_shape(subgraph.tensors[i]) if i >= 0 else [] for i in op.inputs]
        output = _lite_shape(subgraph.tensors[op.outputs[0]]) if op.outputs is not None and len(op.outputs) else []
        options = op.builtinOptions
        if name == "CONV_2D":
            count.macs += product(output) * product(shapes[1][1:])  # filter: outputs, window, inputs of a group
        elif name == "DEPTHWISE_CONV_2D":
            count.macs += product(output) * product(shapes[1][1:3])  # filter: 1, window, outputs
        elif name == "CONV_3D":
            count.macs += product(output) * product(shapes[1][:-1])
        elif name == "TRANSPOSE_CONV":
            count.macs += product(shapes[2]) * product(shapes[1][:3])  # filter: outputs, window, inputs
        elif name == "FULLY_CONNECTED":
            count.macs += product(output) * shapes[1][-1]
        elif name == "BATCH_MATMUL":
            count.macs += product(output) * shapes[0][-2 if options.adjX else -1]
        elif name == "UNIDIRECTIONAL_SEQUENCE_LSTM":
            count.macs += product(shapes[0][:2]) * sum(product(shape) for shape in shapes[1:9] if shape)
        else:
            branches = [
                getattr(options, key)
                for key in ("thenSubgraphIndex", "elseSubgraphIndex", "condSubgraphIndex", "bodySubgraphIndex")
                if hasattr(options, key)
            ]
            if name == "WHILE":
                count.notes.add("the body of a loop is counted once")
            tried = [Count() for _ in branches]
            for branch, each in zip(branches, tried, strict=True):
                _count_subgraph(model, branch, names, each)
            count.macs += max((each.macs for each in tried), default=0)
            count.notes.update(*(each.notes for each in tried))


def _lite_shape(tensor: Any) -> list[int]:
    return [] if tensor.shape is None else [int(size) for size in tensor.shape]
