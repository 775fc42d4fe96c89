"""TensorFlow Serving's BatchingParameters: the text that --batching_parameters_file and batching_params.pbtxt hold.

tensorflow-serving-api lacks the proto, so that its fields are declared here; a text has no field numbers, so names and
types are all that matters. The rules and defaults are those of tensorflow_serving's WrapSessionForBatching and
GetQueueOptions and of TensorFlow's SharedBatchScheduler, which refuse a model at load where they are broken.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2

from tfopt.errors import TfoptError

FILE = "batching_params.pbtxt"  # its name in a version directory, for --enable_per_model_batching_parameters

_WRAPPED = {
    "max_batch_size": "Int64Value",
    "batch_timeout_micros": "Int64Value",
    "max_enqueued_batches": "Int64Value",
    "num_batch_threads": "Int64Value",
    "thread_pool_name": "StringValue",
    "enable_large_batch_splitting": "BoolValue",
    "max_execution_batch_size": "Int64Value",
}


@dataclasses.dataclass(frozen=True)
class BatchingParameters:
    """The parameters as given; what is None is TensorFlow Serving's default (see `filled`).

    Attributes:
      max_batch_size: the most rows of one request, and of one batch unless `max_execution_batch_size` is less.
      batch_timeout_micros: how long a batch waits to be filled, in microseconds.
      max_enqueued_batches: batches that wait for a thread, per signature; what comes then fails with UNAVAILABLE.
      num_batch_threads: batches that run at once, over all models.
      thread_pool_name: of the threads.
      allowed_batch_sizes: a batch is padded to the least of them that holds it; empty: no padding.
      pad_variable_length_inputs: whether inputs that differ beyond dimension 0 are padded to the longest of a batch.
      enable_large_batch_splitting: whether a request may be spread over several batches.
      max_execution_batch_size: the most rows of one batch where requests are split; without that it has no effect.
    """

    max_batch_size: int | None = None
    batch_timeout_micros: int | None = None
    max_enqueued_batches: int | None = None
    num_batch_threads: int | None = None
    thread_pool_name: str | None = None
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool | None = None
    max_execution_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Checks what TensorFlow Serving checks when it loads a model.

        Raises:
          TfoptError: it would refuse them; names the field.
        """
        object.__setattr__(self, "allowed_batch_sizes", tuple(self.allowed_batch_sizes))
        if problem := self._problem():
            raise TfoptError(problem)

    def filled(self) -> BatchingParameters:
        """With TensorFlow Serving's defaults where nothing was given; threads: the CPUs that this process may use."""
        most = 1000 if self.max_batch_size is None else self.max_batch_size
        splitting = bool(self.enable_large_batch_splitting)
        execution = self.max_execution_batch_size if splitting else None
        return dataclasses.replace(
            self,
            max_batch_size=most,
            batch_timeout_micros=self.batch_timeout_micros or 0,
            max_enqueued_batches=10 if self.max_enqueued_batches is None else self.max_enqueued_batches,
            num_batch_threads=cpus() if self.num_batch_threads is None else self.num_batch_threads,
            thread_pool_name=self.thread_pool_name or "batch_threads",
            enable_large_batch_splitting=splitting,
            max_execution_batch_size=most if execution is None else execution,
        )

    def padded(self, rows: int) -> int:
        """How many rows a batch of `rows` runs with: the least allowed size that holds it, or `rows` itself."""
        return next((size for size in self.allowed_batch_sizes if size >= rows), rows)

    def text(self) -> str:
        """The parameters that are given, as text that TensorFlow Serving reads."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "allowed_batch_sizes":
                lines += [f"{field.name}: {size}" for size in value]
            elif field.name == "pad_variable_length_inputs":
                lines += [f"{field.name}: true"] if value else []
            elif value is not None:
                wrapper: Any = getattr(wrappers_pb2, _WRAPPED[field.name])(value=value)
                lines.append(f"{field.name} {{ value: {_scalar(wrapper.value)} }}")
        return "".join(f"{line}\n" for line in lines)

    def _problem(self) -> str | None:
        """The first rule of TensorFlow Serving that is broken, in words."""
        for name, least in (
            ("max_batch_size", 1),
            ("batch_timeout_micros", 0),
            ("max_enqueued_batches", 1),
            ("num_batch_threads", 1),
            ("max_execution_batch_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                return f"{name} is {value}; it must be at least {least}"
        most, sizes = self.max_batch_size, self.allowed_batch_sizes
        limit = 1000 if most is None else most
        known = f"max_batch_size ({limit}{', the default' if most is None else ''})"
        execution = self.max_execution_batch_size if self.enable_large_batch_splitting else None
        if execution is not None and execution > limit:
            return f"max_execution_batch_size is {execution}, more than {known}"
        if self.enable_large_batch_splitting and execution is None and most is None:
            return "enable_large_batch_splitting needs max_execution_batch_size or max_batch_size"
        if sizes and sizes[0] < 1:
            return f"allowed_batch_sizes holds {sizes[0]}; sizes are at least 1"
        for one, other in itertools.pairwise(sizes):
            if other <= one:
                return f"allowed_batch_sizes must increase, but {other} follows {one}"
        if sizes and sizes[-1] not in {limit, execution}:
            wanted = known if execution is None else f"{known} or max_execution_batch_size ({execution})"
            return f"allowed_batch_sizes ends at {sizes[-1]}; the last one must be {wanted}"
        return None


def cpus() -> int:
    """The CPUs that this process may use, which is how many batch threads TensorFlow Serving makes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(path: str | Path) -> BatchingParameters:
    """Reads a batching parameters file.

    Raises:
      TfoptError: it cannot be read, or TensorFlow Serving would refuse it; names the file and the field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TfoptError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, str(path))


def parse(text: str, source: str = "batching parameters") -> BatchingParameters:
    """Parses the text form of tensorflow.serving.BatchingParameters.

    Args:
      text: for instance `max_batch_size { value: 32 } allowed_batch_sizes: 8 allowed_batch_sizes: 32`.
      source: what errors call it.

    Raises:
      TfoptError: it is no such text, or TensorFlow Serving would refuse it.
    """
    message: Any = _message()()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        reason = str(error)
        if "has no field named" in reason:
            name = reason.split('"')[-2]
            raise TfoptError(
                f"{source}: unknown field {name!r} (line {error.GetLine()}); known are "
                f"{', '.join(field.name for field in dataclasses.fields(BatchingParameters))}"
            ) from error
        raise TfoptError(
            f"{source}: {reason}; a field is written as in `max_batch_size {{ value: 32 }}`, "
            "lists and pad_variable_length_inputs as in `allowed_batch_sizes: 32`"
        ) from error
    given = {name: getattr(message, name).value for name in _WRAPPED if message.HasField(name)}
    try:
        return BatchingParameters(
            **given,
            allowed_batch_sizes=tuple(message.allowed_batch_sizes),
            pad_variable_length_inputs=message.pad_variable_length_inputs,
        )
    except TfoptError as error:
        raise TfoptError(f"{source}: {error}") from error


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value).lower()


@functools.cache
def _message() -> type:
    """The proto's class, made from its fields; in a pool of its own, so that it cannot clash with a real one."""
    file = descriptor_pb2.FileDescriptorProto(
        name="tfopt/batching_parameters.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto"],
    )
    message = file.message_type.add(name="BatchingParameters")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, (name, kind) in enumerate(_WRAPPED.items(), 1):
        message.field.add(
            name=name, number=number, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE,
            type_name=f".google.protobuf.{kind}",
        )  # fmt: skip
    message.field.add(name="allowed_batch_sizes", number=100, label=kinds.LABEL_REPEATED, type=kinds.TYPE_INT64)
    message.field.add(name="pad_variable_length_inputs", number=101, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_BOOL)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.serving.BatchingParameters"))
