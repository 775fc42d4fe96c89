"""OpenVINO's side of the quantization benchmark; runs in its own environment, so it imports nothing of this project.

    openvino_child.py quantize '{"saved_model": ..., "path": "x.xml", ...}'    prints one line of notes
    openvino_child.py serve x.xml 1 rows.npz input_1                           answers "runs N" with N times, in seconds

`quantize` also writes the top class of every test row beside the file, as the other artifacts get them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov


def _read(job: dict, rows: np.ndarray) -> tuple[ov.Model, str]:
    try:
        model = ov.convert_model(job["saved_model"])
        compiled(model, 1)(rows[:1])
        return model, ""
    except Exception as error:
        if not Path(job["float32"]).is_file():
            raise
        reason = next(line for line in reversed(str(error).splitlines()) if line.strip())
        return ov.convert_model(job["float32"]), f"read from the float TFLite: the SavedModel gave {reason[:120]}"


def compiled(model: ov.Model, threads: int) -> ov.CompiledModel:
    """Returns the model ready to run, tuned for latency."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return ov.Core().compile_model(model, "CPU", settings)


def quantize(job: dict) -> None:
    """Quantizes with NNCF's defaults; writes the model (.xml, .bin) and its test predictions."""
    import nncf

    rows = np.load(job["representative"])[job["key"]]
    model, note = _read(job, rows)
    kind = nncf.ModelType.TRANSFORMER if job["transformer"] else None
    quantized = nncf.quantize(model, nncf.Dataset([row[None] for row in rows]), model_type=kind)
    ov.save_model(quantized, job["path"])
    program = compiled(ov.Core().read_model(job["path"]), 1)
    top = [int(np.argmax(program(row[None])[0])) for row in np.load(job["test"])[job["key"]]]
    np.save(Path(job["path"]).with_suffix(".top.npy"), np.array(top))
    precision = program.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    print("; ".join(filter(None, [note, f"what stays float runs in {precision}"])))


def serve(path: str, threads: str, rows: str, key: str) -> None:
    """Times calls on the first row, as many as each line of stdin asks for."""
    request = compiled(ov.Core().read_model(path), int(threads)).create_infer_request()
    row = np.load(rows)[key][:1]
    for _ in range(5):
        request.infer([row])
    for line in sys.stdin:
        request.infer([row])  # untimed: others had the caches in the meantime
        times = []
        for _ in range(int(line.split()[1])):
            start = time.perf_counter()
            request.infer([row])
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(json.loads(sys.argv[2]))
    else:
        serve(*sys.argv[2:])
