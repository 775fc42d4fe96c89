"""What the rules of the linter look at, and what they say."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef, SignatureDef

from tfopt import hazards
from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError
from tfopt.inline import INIT_SIGNATURE, TRAIN_SIGNATURE
from tfopt.model import Model
from tfopt.model import load as load_model
from tfopt.serving import batching_parameters
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.lint.graph import assigned_state

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)
_PROBE_S = 900.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a server or a client will stumble over.

    Attributes:
      rule: its id.
      severity: ERROR: it does not work; WARNING: it may not, or not as one thinks; INFO: good to know.
      where: the file, node, signature, input or flag.
      reason: why.
      todo: what to do.
    """

    rule: str
    severity: str
    where: str
    reason: str
    todo: str


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of tensorflow_model_server that matter, under their names there.

    `memory_bytes` is what its container may use, and `data` real rows to try the model with (see `tfopt.data.load`).
    """

    enable_batching: bool = False
    batching_parameters_file: str | None = None
    enable_per_model_batching_parameters: bool = False
    prefer_tflite_model: bool = False
    xla_cpu_compilation_enabled: bool = False
    enable_model_warmup: bool = True
    enable_signature_method_name_check: bool = False
    model_config_file: str | None = None
    memory_bytes: int | None = None
    data: str | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a signature did in a v1 session.

    Attributes:
      error: why it did not run; None where it did.
      unsplit: outputs that have not one row for each row of a batch.
      mixed: the first output of a row that the other rows of the batch change, in words; None where there is none.
    """

    error: str | None = None
    unsplit: tuple[str, ...] = ()
    mixed: str | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the model did in a v1 session, in a process of its own.

    Attributes:
      load_error: why it does not load; None where it does.
      trials: signature -> what it did; empty where tfopt knows no inputs.
      warmup_error: why a warmup request failed; None where all were answered.
    """

    load_error: str | None = None
    trials: dict[str, Trial] = dataclasses.field(default_factory=dict)
    warmup_error: str | None = None


class Subject:
    """A version directory, and the flags that it will be served with.

    Attributes:
      directory: the version directory.
      base: the base path, where one was given.
      flags: of the server.
      meta: the MetaGraph that serves.
      run: whether the model is run, in a process of its own.
    """

    def __init__(self, directory: Path, base: Path | None, flags: Flags, meta: MetaGraphDef, *, run: bool = True):
        self.directory, self.base, self.flags, self.meta, self.run = directory, base, flags, meta, run

    @functools.cached_property
    def signatures(self) -> dict[str, SignatureDef]:
        """Those that clients see."""
        known = self.meta.signature_def.items()
        return {name: s for name, s in sorted(known) if name not in (INIT_SIGNATURE, TRAIN_SIGNATURE)}

    @functools.cached_property
    def hazards(self) -> list[hazards.Hazard]:
        """Nodes that do more than compute, but for saving and restoring."""
        return [hazard for hazard in hazards.scan(self.meta) if not hazard.routine]

    @functools.cached_property
    def model(self) -> Model | None:
        """The model as tfopt reads it; None where it cannot."""
        try:
            return load_model(self.directory)
        except TfoptError:
            return None

    @functools.cached_property
    def state(self) -> dict[str, str]:
        """Signature -> the state that it assigns."""
        return assigned_state(self.model) if self.model else {}

    @functools.cached_property
    def batching_file(self) -> Path | None:
        """Where the model's batching parameters come from; None: from nowhere."""
        if not self.flags.enable_batching:
            return None
        if self.flags.enable_per_model_batching_parameters:
            path = self.directory / batching_parameters.FILE
            return path if path.is_file() else None
        return Path(self.flags.batching_parameters_file) if self.flags.batching_parameters_file else None

    @property
    def batches(self) -> bool:
        """Whether the server batches requests to this model."""
        alone = self.flags.enable_per_model_batching_parameters and self.batching_file is None
        return self.flags.enable_batching and not alone

    @functools.cached_property
    def batching(self) -> BatchingParameters | None:
        """The model's batching parameters; None without batching, or where they cannot be read."""
        if not self.batches:
            return None
        try:
            return batching_parameters.read(self.batching_file) if self.batching_file else BatchingParameters()
        except TfoptError:
            return None

    @functools.cached_property
    def probe(self) -> Probe:
        """What it does in a v1 session."""
        if not self.run:
            return Probe()
        request: dict[str, Any] = {"directory": str(self.directory), "data": self.flags.data}
        with Child("tfopt.serving.lint.probe:worker") as child:
            try:
                return child.ask(request, _PROBE_S)
            except ChildError as error:
                return Probe(load_error=f"the process that loaded it {error}")


def shape_text(dims: list[int]) -> str:
    """(?, 3)"""
    return "(" + ", ".join("?" if d < 0 else str(d) for d in dims) + ")"
