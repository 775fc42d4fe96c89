"""Rules about batching: can requests be joined along dimension 0, and the answers split again?"""

from __future__ import annotations

from collections.abc import Iterator

from tfopt.errors import TfoptError
from tfopt.serving import batching_parameters
from tfopt.serving.lint.graph import unbatchable
from tfopt.serving.lint.subject import ERROR, INFO, WARNING, Finding, Subject, shape_text

_APART = "leave --enable_batching off for this model (--enable_per_model_batching_parameters without a file of its own)"


def parameters(subject: Subject) -> Iterator[Finding]:
    """The flags and the parameters fit each other."""
    flags = subject.flags
    if not flags.enable_batching:
        for given in ("batching_parameters_file", "enable_per_model_batching_parameters"):
            if getattr(flags, given):
                yield Finding(
                    "batching-off", WARNING, f"--{given}", "has no effect without --enable_batching",
                    "add --enable_batching, or leave it out",
                )  # fmt: skip
        return
    if not subject.batches:
        yield Finding(
            "batching-off", WARNING, f"{subject.directory.name}/{batching_parameters.FILE}",
            "is not there, so with --enable_per_model_batching_parameters this model is not batched",
            "write it (tfopt-deployment --enable_per_model_batching_parameters), or leave that flag out",
        )  # fmt: skip
        return
    if subject.batching_file is None:
        yield Finding(
            "batching-defaults", INFO, "--enable_batching",
            "without parameters batches have up to 1,000 rows, none is padded, and none waits",
            "measure the model's own: tfopt-tune-batching",
        )  # fmt: skip
        return
    try:
        found = batching_parameters.read(subject.batching_file)
    except TfoptError as error:
        reason = str(error).removeprefix(f"{subject.batching_file}: ")
        yield Finding("batching-parameters", ERROR, str(subject.batching_file), reason, "correct the file")
        return
    if found.max_execution_batch_size is not None and not found.enable_large_batch_splitting:
        yield Finding(
            "batching-parameters", WARNING, str(subject.batching_file),
            "max_execution_batch_size has no effect without enable_large_batch_splitting",
            "add enable_large_batch_splitting { value: true }, or leave it out",
        )  # fmt: skip
    sizes = found.allowed_batch_sizes
    if sizes and sizes[-1] != found.filled().max_batch_size:
        yield Finding(
            "batching-parameters", WARNING, str(subject.batching_file),
            f"allowed_batch_sizes ends at {sizes[-1]}, and releases of TensorFlow Serving want max_batch_size "
            f"({found.filled().max_batch_size}) there, also where batches are split",
            "try it with the release that serves",
        )  # fmt: skip


def dimension_0(subject: Subject) -> Iterator[Finding]:
    """All inputs share dimension 0, and all outputs have it."""
    if not subject.batches:
        return
    for name, signature in subject.signatures.items():
        for where, reason in unbatchable(signature):
            yield Finding(
                "batching-dimension-0", ERROR, f"signature {name!r}{': ' + where if where else ''}",
                f"{reason}: with batching on, requests to it fail", _APART,
            )  # fmt: skip
        trial = subject.probe.trials.get(name)
        for output in trial.unsplit if trial else ():
            yield Finding(
                "batching-dimension-0", ERROR, f"signature {name!r}: output {output!r}",
                "has not one row for each row of a batch (seen in a run): it cannot be split over requests", _APART,
            )  # fmt: skip


def rows_apart(subject: Subject) -> Iterator[Finding]:
    """The answer to a row does not depend on the rows that happen to share its batch."""
    for name, trial in subject.probe.trials.items():
        if trial.mixed:
            yield Finding(
                "batch-mixes-rows", ERROR if subject.batches else WARNING, f"signature {name!r}",
                f"a row is answered differently in a batch than alone: {trial.mixed}",
                "make the model treat rows apart (batch norm in training mode, a maximum over the batch?)"
                + (f", or {_APART}" if subject.batches else ""),
            )  # fmt: skip


def variable_lengths(subject: Subject) -> Iterator[Finding]:
    """Inputs that differ beyond dimension 0 are padded, and the model can stand it."""
    if not subject.batches or subject.batching is None:
        return
    for name, signature in subject.signatures.items():
        for key, info in sorted(signature.inputs.items()):
            dims = [d.size for d in info.tensor_shape.dim]
            if not any(d < 0 for d in dims[1:]):
                continue
            where = f"signature {name!r}: input {key!r} {shape_text(dims)}"
            if subject.batching.pad_variable_length_inputs:
                yield Finding(
                    "batching-padding", INFO, where,
                    "shorter requests are padded with their own first value, not with zeros, and outputs stay padded",
                    "check that the model ignores padding, or pad in the client",
                )  # fmt: skip
            else:
                yield Finding(
                    "batching-padding", WARNING, where,
                    "requests of different lengths that meet in a batch fail, all of that batch",
                    "add pad_variable_length_inputs: true, or send one length only",
                )  # fmt: skip


RULES = (parameters, dimension_0, rows_apart, variable_lengths)
