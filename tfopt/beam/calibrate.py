"""Calibration on Beam: what `tfopt.calibration.observe` sees of tensors, over rows that no one machine has to hold.

    rows | ReadRows(...) | Observe(job)      one element, a Seen: reference -> tfopt.clipping.Observed

Every worker runs the model, opened at the tensors, on its batches; their extremes are merged, go to all workers, and
are what the histograms are counted between, which merge by addition. Every batch but the last has the rows of a call
of `calibration.observe`, and the model runs in the same kind of session, so that the result is the same to the last
bit, on machines of the same kind (TensorFlow chooses its kernels by the processor) with the same TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import GoogleCloudOptions
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from tfopt import calibration
from tfopt.beam import pipeline
from tfopt.beam.model_handler import local_copy
from tfopt.beam.rows import ReadRows
from tfopt.clipping import Observed
from tfopt.data import Dataset, batch_size, load
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.graph import infer_tensors, join, split
from tfopt.model import Model
from tfopt.model import load as load_model
from tfopt.verify import features, input_specs


@dataclasses.dataclass
class Seen:
    """What was seen of some rows.

    Attributes:
      rows: how many.
      end: number of the last row, plus 1; `rows` where none was lost and none doubled.
      tensors: reference -> extremes, and perhaps counts; those that hold values.
    """

    rows: int = 0
    end: int = 0
    tensors: dict[str, Observed] = dataclasses.field(default_factory=dict)

    def merge(self, other: Seen) -> None:
        """Takes in what was seen elsewhere, which is left as it is."""
        self.rows, self.end = self.rows + other.rows, max(self.end, other.end)
        for ref, found in other.tensors.items():
            self.tensors.setdefault(ref, Observed()).merge(found)


@dataclasses.dataclass(frozen=True)
class Job:
    """What to look at.

    Attributes:
      path: a SavedModel whose signature has the tensors for its outputs, where every worker can read it.
      signature: the one that is fed.
      refs: the tensors.
      size: rows of a call.
      first: the first rows, with which the last batch is filled up where the signature's batch is fixed; else None.
    """

    path: str
    signature: str
    refs: tuple[str, ...]
    size: int
    first: Dataset | None = None


class Observe(beam.PTransform):
    """PCollection[tfopt.data.Dataset] -> PCollection of one `Seen`."""

    def __init__(self, job: Job, counts: bool = True):
        """Takes what can be pickled.

        Args:
          job: what to look at.
          counts: whether histograms are wanted beside the extremes.
        """
        super().__init__()
        self._job = job
        self._counts = counts

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        """Extremes, and then what lies between them."""
        shared = Shared()
        seen = rows | "Extremes" >> beam.ParDo(_Extremes(self._job, shared)) | "Merge" >> beam.CombineGlobally(_Merge())
        if not self._counts:
            return seen
        counted = beam.ParDo(_Counts(self._job, shared), beam.pvalue.AsSingleton(seen))
        return rows | "Count" >> counted | "Add" >> beam.CombineGlobally(_Merge())


def observe(
    model: Model, signature: str, refs: Sequence[str], source: str, beam_args: str, counts: bool = True
) -> dict[str, Observed]:
    """`calibration.observe` of all rows of a source, on Beam.

    Args:
      model: the model; it may not have state, which would go from row to row.
      signature: the one that is fed.
      refs: tensors of the main body.
      source: representative rows, see `tfopt.data.load`.
      beam_args: see `pipeline.options`. Workers on other machines get the model through --temp_location.
      counts: whether histograms are wanted.

    Raises:
      TfoptError: as `calibration.observe` and `pipeline.run` do.
    """
    if model.state:
        raise TfoptError(f"the model has state ({min(model.state)}): calibrate it without --beam_args, row after row")
    opened = _typed(calibration.opened_at(model, signature, refs), signature)
    specs, feature_spec = input_specs(model, signature), features(model, signature)
    fixed = batch_size(specs, 0)
    first = load(source, specs, feature_spec=feature_spec, limit=fixed or 1)
    size = calibration.call_rows(model, signature, refs, first)
    rows = ReadRows(source, specs, feature_spec, batch_size=size)
    with _published(opened, beam_args) as path:
        job = Job(path, signature, tuple(refs), size, first if fixed else None)
        seen = pipeline.run(lambda start: start | "Rows" >> rows | "Observe" >> Observe(job, counts), beam_args)
    pipeline.check_rows(seen.rows, seen.end)
    calibration.check_seen(seen.tensors, refs, source)
    return {ref: seen.tensors[ref] for ref in refs}


def _typed(opened: Model, signature: str) -> Model:
    """The model with this signature alone, whose outputs have the dtypes that a SavedModel needs."""
    definition = opened.signatures[signature]
    opened.signatures = {signature: definition}
    tensors = infer_tensors(opened.graph, opened.library())
    for info in definition.outputs.values():
        info.dtype = tensors[join(*split(info.name))][0].as_datatype_enum
    return opened


@contextlib.contextmanager
def _published(model: Model, beam_args: str) -> Iterator[str]:
    """A SavedModel of a model, for a while, where workers can read it: in --temp_location where that is given."""
    shared = pipeline.options(beam_args).view_as(GoogleCloudOptions).temp_location
    with tempfile.TemporaryDirectory(prefix="tfopt-model-") as folder:
        path = Path(folder) / "model"
        saved_model.save(model, path)
        if shared is None:
            yield str(path)
            return
        place = FileSystems.join(shared, f"tfopt-model-{uuid.uuid4().hex}")
        try:
            for file in (each for each in path.rglob("*") if each.is_file()):
                target = FileSystems.join(place, *file.relative_to(path).parts)
                with file.open("rb") as source, FileSystems.create(target) as stream:
                    shutil.copyfileobj(source, stream, 1 << 24)
            yield place
        finally:
            with contextlib.suppress(Exception):  # what is left is in nobody's way
                FileSystems.delete([f"{place}/" if "://" in place else place])


class _Opened:
    """The model, opened once in a process for all its threads."""

    def __init__(self, path: str):
        self.function = Function(load_model(local_copy(path)))


class _Looking(beam.DoFn):
    """Batches -> what was seen of the tensors in a bundle."""

    def __init__(self, job: Job, shared: Shared):
        self._job = job
        self._shared = shared

    def setup(self) -> None:
        self._opened = self._shared.acquire(lambda: _Opened(self._job.path))

    def start_bundle(self) -> None:
        self._seen = Seen()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        yield WindowedValue(self._seen, GlobalWindow().max_timestamp(), [GlobalWindow()])

    def _tensors(self, rows: Dataset) -> dict[str, np.ndarray]:
        job = self._job
        self._seen.merge(Seen(len(rows), rows.start + len(rows)))
        inputs = rows.inputs if job.first is None else calibration.filled(rows, job.size, job.first)
        return calibration.inner(self._opened.function, job.signature, job.refs, inputs)


class _Extremes(_Looking):
    def process(self, rows: Dataset) -> None:
        calibration.check_inputs(rows)
        for ref, found in calibration.extremes(self._tensors(rows), rows).items():
            self._seen.tensors.setdefault(ref, Observed()).merge(found)


class _Counts(_Looking):
    def process(self, rows: Dataset, extremes: Seen) -> None:
        pipeline.check_rows(extremes.rows, extremes.end)
        for ref, array in self._tensors(rows).items():
            if ends := extremes.tensors.get(ref):  # where nothing was seen, that is an error in the end
                self._seen.tensors.setdefault(ref, Observed(ends.low, ends.high)).add(array)


class _Merge(beam.CombineFn):
    """Merges what was seen; does not change what it is given."""

    def create_accumulator(self) -> Seen:
        return Seen()

    def add_input(self, merged: Seen, seen: Seen) -> Seen:
        merged.merge(seen)
        return merged

    def merge_accumulators(self, accumulators: Iterable[Seen]) -> Seen:
        merged = Seen()
        for each in accumulators:
            merged.merge(each)
        return merged

    def extract_output(self, merged: Seen) -> Seen:
        return merged
