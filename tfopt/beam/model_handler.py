"""An artifact, SavedModel or .tflite file, behind Beam's RunInference.

    batches | RunInference(ProgramHandler("saved_models/digits", "serving_default"))

Elements are batches (`tfopt.data.Dataset`), which reach the runtime as they are, because the last bits of a row's
output may depend on how many rows are computed with it, and Beam's own batches depend on how a runner cuts its
bundles. (On 250 rows of three SavedModels, keyword spotting, taxi trips and digits, rows in batches of 8, 32, 33 and
250 gave the same bits, with 1 thread and with 2; rows alone differed by up to 1.7e-6. A float .tflite file gave the
same bits throughout.) With the batches of `rows.ReadRows` the outputs are, bit for bit, those of the same artifact in
one process with as many threads, on a processor with the same instructions. A model that changes its own variables
answers by the order in which batches reach it, which no runner keeps.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from tfopt import inference_job, runtime
from tfopt.data import Dataset
from tfopt.errors import TfoptError

THREADS = 1  # of one artifact's runtime: a runner keeps the cores busy with processes


class LockedProgram(runtime.Program):
    """An opened artifact that the threads of a process can share.

    LiteRT's interpreter holds one set of tensors, so one call at a time runs on it. A SavedModel takes as many as come.
    """

    def __init__(self, path: str, threads: int | None = THREADS):
        self._program = runtime.open(local_copy(path), threads)
        super().__init__(self._program.path)
        self.loader, self.signatures = self._program.loader, self._program.signatures
        one_at_a_time = self.loader in (runtime.LITERT, runtime.PLAIN)
        self._turn: Any = threading.Lock() if one_at_a_time else contextlib.nullcontext()

    def run(self, signature: str, inputs: Mapping[str, Any]) -> runtime.Outputs:
        """See `tfopt.runtime.Program.run`."""
        with self._turn:
            return self._program.run(signature, inputs)

    def _bind(self, signature: str, arrays: dict[str, np.ndarray]) -> Callable[[], runtime.Outputs]:
        return self._program._bind(signature, arrays)

    def close(self) -> None:
        """See `tfopt.runtime.Program.close`."""
        self._program.close()


class ProgramHandler(ModelHandler[Dataset, PredictionResult, LockedProgram]):
    """Runs a signature of an artifact; gives a PredictionResult for each batch: the batch, and outputs by name."""

    def __init__(self, path: str, signature: str, threads: int | None = THREADS):
        """Takes what can be pickled; the artifact is opened by `load_model`, once in a process.

        Args:
          path: a SavedModel directory or .tflite file, which a worker can reach; remote ones are copied first.
          signature: its name.
          threads: of the runtime. Outputs may depend on it in their last bits.
        """
        super().__init__()
        self._path = str(path)
        self._signature = signature
        self._threads = threads

    def load_model(self) -> LockedProgram:
        """Opens the artifact."""
        return LockedProgram(self._path, self._threads)

    def run_inference(
        self, batch: Any, model: LockedProgram, inference_args: Mapping[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Runs one batch."""
        yield PredictionResult(batch, inference_job.call(model, self._signature, batch), self._path)

    def should_skip_batching(self) -> bool:
        """Elements are batches."""
        return True

    def get_num_bytes(self, batch: Any) -> int:
        """Bytes of the inputs, for Beam's metrics; those of strings are not counted."""
        return sum(array.nbytes for array in batch.inputs.values())

    def get_metrics_namespace(self) -> str:
        """Under which Beam's metrics stand."""
        return "tfopt"


@functools.cache
def local_copy(path: str) -> str:
    """The path itself, or where a copy of a remote artifact lies; copied once in a process."""
    if "://" not in path:
        if not Path(path).exists():
            raise TfoptError(f"{path}: not there on the worker: put the artifact where every worker can read it")
        return path
    root = path.rstrip("/")
    copy = Path(tempfile.mkdtemp(prefix="tfopt-artifact-"), root.rpartition("/")[2])
    files = _matches(f"{root}/**") or _matches(root)  # a directory matches its own name too, where there are some
    if not files:
        raise TfoptError(f"{path}: no such SavedModel directory or .tflite file")
    for file in files:
        target = copy / file[len(root) :].lstrip("/")  # the copy itself, where the artifact is one file
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileSystems.open(file, compression_type=CompressionTypes.UNCOMPRESSED) as source,
            target.open("wb") as stream,
        ):
            shutil.copyfileobj(source, stream, 1 << 24)
    return str(copy)


def _matches(pattern: str) -> list[str]:
    (found,) = FileSystems.match([pattern])
    return [meta.path for meta in found.metadata_list if not meta.path.endswith("/")]
