"""Makes what the edge environment runs: small models as .tflite files of every kind, and their outputs here.

    python -m tests.edge.emit build/edge          # in the main environment
    python -m pytest tests/edge                   # then, in one with tflite-runtime==2.14, "numpy<2" and pytest

`make test-edge` does both. The folder gets `cases.json` (a list of the cases that run_test.py checks), and for each
model `inputs.<signature>.npz`, `<file>.tflite` and `<file>.<signature>.npz` with the outputs that ai-edge-litert gives.
Cases with a `problem` are files for the default runtime that tfopt says the old one cannot run: run_test.py proves it.
`versions/` holds a file for the latest version of each op that the old runtime has, and one for the version after it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfopt import model, runtime
from tfopt.data import Dataset
from tfopt.export import saved_model, tflite
from tfopt.export.fixed_batch import fix_batch
from tfopt.export.tflite_file import TfliteFile
from tfopt.export.tflite_names import pack
from tfopt.export.tflite_old_runtime import LATEST, problems

ROWS = 40


def convnet():
    """Convolutions and pooling, with a batch norm that the converter has to fold."""
    from keras import layers

    image = layers.Input((16, 16, 3), name="image")
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(image)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.Conv2D(64, 1, activation="relu6")(x)
    x = layers.Concatenate()([layers.MaxPooling2D(2)(x), layers.AveragePooling2D(2)(x)])
    return image, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def dense():
    """Fully connected layers, the op whose newest version old runtimes do not have."""
    from keras import layers

    features = layers.Input((64,), name="features")
    x = layers.Dense(128, activation="relu")(features)
    return features, layers.Dense(8)(layers.Dense(64, activation="tanh")(x))


def attention():
    """A transformer block: batched matrix products, layer normalization, gelu."""
    from keras import layers

    tokens = layers.Input((12, 32), name="tokens")
    x = layers.LayerNormalization()(tokens + layers.MultiHeadAttention(4, 8)(tokens, tokens))
    x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, activation="gelu")(x)))
    return tokens, layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling1D()(x))


def recurrent():
    """A loop: neither int8 quantizer can calibrate one, so there is no int8 file."""
    from keras import layers

    steps = layers.Input((10, 8), name="steps")
    return steps, layers.Dense(4)(layers.LSTM(16)(steps))


def arithmetic():
    """Ops without an integer kernel in the old runtime."""
    from keras import layers, ops

    features = layers.Input((32,), name="features")
    x = layers.Dense(64)(features)
    x = x / (ops.abs(x) + 1.0) + ops.sqrt(ops.relu(x) + 0.1)
    return features, layers.Dense(8)(x)


def upsampling():
    """A transposed convolution."""
    from keras import layers

    image = layers.Input((8, 8, 8), name="image")
    x = layers.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu")(image)
    return image, layers.Conv2D(4, 3, padding="same")(x)


MODELS: dict[str, Callable] = {
    "convnet": convnet,
    "dense": dense,
    "attention": attention,
    "recurrent": recurrent,
    "arithmetic": arithmetic,
    "upsampling": upsampling,
}
FILES = ("float32", "float16", "dynamic_int8", "weight_int8", "int8", "int16x8")
RECURRENT = ("float32", "float16", "dynamic_int8", "weight_int8")
REFUSED = ("dynamic_int4", "dynamic_int4_b32", "weight_int4", "int4")
# What the default runtime gets, and the old one would fail at or get wrong.
PROBLEMS = {
    "convnet": ("dynamic_int8", "dynamic_int4", "weight_int4"),
    "dense": ("dynamic_int4_b32", "weight_int4", "int4"),
    "attention": ("int16x8",),
    "arithmetic": ("int8", "int16x8"),
    "upsampling": ("dynamic_int8",),
}


def emit(folder: Path) -> list[dict]:
    """Fills `folder` and returns the cases."""
    import keras

    cases = []
    for name, build in MODELS.items():
        keras.utils.set_random_seed(0)
        keras.backend.clear_session()
        inputs, outputs = build()
        target = folder / name
        with tempfile.TemporaryDirectory() as work:
            keras.Model(inputs, outputs).export(f"{work}/keras", verbose=False)
            loaded = model.load(f"{work}/keras", ["serving_default"])
            saved_model.save(fix_batch(loaded, 1), f"{work}/serving")
            rows = np.random.default_rng(0).normal(size=(ROWS, *inputs.shape[1:])).astype(np.float32)
            data = {"serving_default": Dataset({inputs.name: rows}, None, "random")}
            target.mkdir(parents=True)
            np.savez(target / "inputs.serving_default.npz", **data["serving_default"].inputs)

            def convert(names, output, serving=f"{work}/serving", data=data, **options):
                return tflite.convert(serving, names, output, representative=data, **options)

            refused = REFUSED if name == "dense" else ()
            files = RECURRENT if name == "recurrent" else FILES
            made = convert((*files, *refused), target, runtime=tflite.OLD)
            for file in [each for each in made if each.name in refused]:
                if file.path or "tflite-runtime 2.14 cannot run it" not in file.error:
                    raise SystemExit(f"{name}: {file.name} was not refused: {file.error}")
                made.remove(file)
            if name == "convnet":
                (integer,) = convert(["int8"], f"{work}/int8", io_type="int8", runtime=tflite.OLD, all_integer=True)
                path = integer.path and Path(shutil.move(integer.path, target / "int8_io.tflite"))
                made.append(tflite.Converted("int8_io", path, integer.error))
            for file in convert(PROBLEMS.get(name, ()), f"{work}/litert"):
                path = file.path and Path(shutil.move(file.path, target / f"{file.name}_litert.tflite"))
                made.append(tflite.Converted(f"{file.name}_litert", path, file.error))
        for file in made:
            if file.path is None:
                raise SystemExit(f"{name}: {file.error}")
            problem = "; ".join(problems(TfliteFile(file.path)))
            if bool(problem) != file.name.endswith("_litert"):
                raise SystemExit(f"{name}: {file.name} should {'not ' if problem else ''}have a problem: {problem}")
            with runtime.open(file.path, threads=1) as program:
                for signature in program.signatures:
                    np.savez(target / f"{file.name}.{signature}.npz", **program.run(signature, {inputs.name: rows}))
                    case = {"model": name, "file": file.name, "signature": signature}
                    cases.append({**case, "problem": problem} if problem else case)
    (folder / "cases.json").write_text(json.dumps(cases, indent=1))
    _versions(folder / "versions")
    return cases


def _versions(folder: Path) -> None:
    """Writes files whose only content is an op code, at the latest version that the old runtime has, and after."""
    folder.mkdir()
    codes = {name: value for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    for name, latest in LATEST.items():
        for version in (latest, latest + 1):
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = codes[name], min(codes[name], 127), version
            tensor = schema.TensorT()
            tensor.name, tensor.shape, tensor.type = b"x", [1], schema.TensorType.FLOAT32
            subgraph = schema.SubGraphT()
            subgraph.tensors, subgraph.inputs, subgraph.outputs, subgraph.operators = [tensor], [0], [0], []
            file = schema.ModelT()
            file.version, file.operatorCodes, file.subgraphs, file.buffers = 3, [code], [subgraph], [schema.BufferT()]
            what = "has" if version == latest else "lacks"
            (folder / f"{what}.{name}.{version}.tflite").write_bytes(pack(file))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.edge.emit FOLDER")
    print(f"{len(emit(Path(sys.argv[1])))} cases in {sys.argv[1]}")
