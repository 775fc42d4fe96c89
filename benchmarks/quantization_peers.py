"""The other quantizers, each as its documentation uses it: one writes one model's file, in a child process.

    python -m benchmarks.quantization_peers --model=fashion_se --peer=tflite_int8 --directory=/tmp/x --json=/tmp/x.json

All get float inputs and outputs, and the same representative rows. What a peer cannot do it says by its own exception.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.children import one_line
from benchmarks.models import CACHE, KERAS_2_FILES, SEED, SHARED
from benchmarks.quantization_cases import Case, case

OPENVINO = CACHE.parent / "venv-openvino"  # apart, since its packages want other versions of NumPy than TensorFlow's
OPENVINO_PACKAGES = ("openvino", "nncf")
QAT_BATCH = 128  # 32 where there are less than 1,000 rows
QAT_LEARNING_RATE = 1e-4


def _rows(found: Case) -> Iterator[np.ndarray]:
    for row in np.load(found.representative)[found.key]:
        yield row[None]


def _converted(found: Case, configure: Callable) -> tuple[bytes, str]:
    """Returns what TFLiteConverter makes of the SavedModel, and a note.

    Where it refuses that, of one that Keras exports again with a batch of 1: TensorFlow's advice for recurrent layers.
    """
    import tensorflow as tf

    def convert(saved_model: str) -> bytes:
        converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
        configure(converter)
        return converter.convert()

    source = CACHE / f"{found.name}.keras"
    try:
        return convert(str(found.saved_model)), ""
    except Exception:
        if not source.is_file():
            raise
        import keras

        model = keras.models.load_model(source, compile=False)
        with tempfile.TemporaryDirectory() as fixed:
            row = tf.TensorSpec((1, *model.inputs[0].shape[1:]), name=found.key)
            model.export(fixed, input_signature=[row], verbose=False)
            return convert(fixed), "exported again with a fixed batch of 1: the converter refuses the dynamic one"


def _float32(found: Case, path: Path) -> str:
    content, note = _converted(found, lambda converter: None)
    path.write_bytes(content)
    return note


def _tflite_int8(found: Case, path: Path) -> str:
    import tensorflow as tf

    def configure(converter) -> None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row] for row in _rows(found))

    content, note = _converted(found, configure)
    path.write_bytes(content)
    return note


def _litert(found: Case, path: Path, dynamic: bool) -> str:
    """litert-quantizer on the plain converter's float32 file."""
    from ai_edge_litert.interpreter import Interpreter
    from litert_quantizer import qtyping, quantizer, recipe

    float32 = path.parent / "float32.tflite"
    if not float32.is_file():
        _float32(found, float32)
    quantization = quantizer.Quantizer(str(float32))
    quantization.load_quantization_recipe(recipe.dynamic_wi8_afp32() if dynamic else recipe.static_wi8_ai8())
    ranges = None
    if not dynamic:
        for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            quantization.update_quantization_recipe(".*", end, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
        ((signature, ends),) = Interpreter(str(float32)).get_signature_list().items()
        (name,) = ends["inputs"]
        ranges = quantization.calibrate({signature: [{name: row} for row in _rows(found)]}, num_threads=1)
    path.write_bytes(bytes(quantization.quantize(ranges).quantized_model))
    return ""


def _keras_2(found: Case):
    """Returns the model in Keras 2, trained where the architecture can be given its weights."""
    import tf_keras

    from benchmarks.fashion_nets import NETS

    if found.name in NETS:
        import keras

        trained = keras.models.load_model(CACHE / f"{found.name}.keras", compile=False)
        model = NETS[found.name](tf_keras)
        ours = [layer for layer in model.layers if layer.weights]
        theirs = [layer for layer in trained.layers if layer.weights]
        for layer, other in zip(ours, theirs, strict=False):
            if [x.shape for x in layer.get_weights()] != [x.shape for x in other.get_weights()]:
                break  # other weights in Keras 2: such a net is only there to be refused
            layer.set_weights(other.get_weights())
        return model
    file = SHARED / KERAS_2_FILES[found.name] if found.name in KERAS_2_FILES else found.saved_model
    return tf_keras.models.load_model(file, compile=False)


def _tfmot_qat(found: Case, path: Path) -> str:
    """TFMOT's QAT on the Keras 2 twin: Adam on the labels, its rate a cosine from 1e-4."""
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.utils.set_random_seed(SEED)
    original = _keras_2(found)
    model = tfmot.quantization.keras.quantize_model(original)
    stored = np.load(found.train)
    images, labels = stored[found.key], stored["label"]
    before = float((original.predict(images[:1000], verbose=0).argmax(1) == labels[:1000]).mean())
    batch = QAT_BATCH if len(images) >= 1000 else 32
    steps = found.epochs * -(-len(images) // batch)
    rate = tf_keras.optimizers.schedules.CosineDecay(QAT_LEARNING_RATE, steps)
    model.compile(tf_keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=batch, epochs=found.epochs, verbose=0)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    path.write_bytes(converter.convert())
    return f"{found.epochs} epochs of {len(images):,} rows; its float twin has {before:.2%} on the first 1,000 of them"


def openvino_python() -> str:
    """Returns the Python that has OpenVINO and NNCF, in an environment of its own that is made where it is missing."""
    python = OPENVINO / "bin" / "python"
    if not (OPENVINO / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", OPENVINO], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *OPENVINO_PACKAGES], check=True)
        (OPENVINO / ".installed").touch()
    return str(python)


def _openvino(found: Case, path: Path) -> str:
    """NNCF's post-training quantization of what OpenVINO reads from the SavedModel."""
    script = Path(__file__).with_name("openvino_child.py")
    job = {"saved_model": str(found.saved_model), "float32": str(path.parent / "float32.tflite"), "key": found.key}
    job |= {"representative": str(found.representative), "test": str(found.test), "path": str(path)}
    job["transformer"] = "vit" in found.name
    done = subprocess.run([openvino_python(), script, "quantize", json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout.splitlines()[-1]


PEERS: dict[str, tuple[str, Callable[[Case, Path], str]]] = {
    "float32": ("float32.tflite", _float32),
    "tflite_int8": ("tflite_int8.tflite", _tflite_int8),
    "litert_static": ("litert_static.tflite", lambda found, path: _litert(found, path, dynamic=False)),
    "litert_dynamic": ("litert_dynamic.tflite", lambda found, path: _litert(found, path, dynamic=True)),
    "tfmot_qat": ("tfmot_qat.tflite", _tfmot_qat),
    "openvino_int8": ("openvino_int8.xml", _openvino),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--directory", required=True, help="where the file goes")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    if arguments.peer == "tfmot_qat":
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
    name, make = PEERS[arguments.peer]
    path = Path(arguments.directory) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        answer = {"path": str(path), "note": make(case(arguments.model), path)}
    except Exception as error:  # whatever a tool raises is its result
        answer = {"error": one_line(error)}
    Path(arguments.json).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
