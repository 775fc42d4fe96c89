"""Rules about signatures: can clients call them, and what do they do there?"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf

from tfopt.hazards import MISSING
from tfopt.serving.lint.subject import ERROR, INFO, WARNING, Finding, Subject
from tfopt.serving.warmup_replay import CLASSIFY, REGRESS

_METHODS = ("tensorflow/serving/predict", CLASSIFY, REGRESS)
_OUTPUTS = {CLASSIFY: {"classes", "scores"}, REGRESS: {"outputs"}}
_UNSET = ("Could not find variable", "uninitialized", "Error while reading resource variable", "Container localhost")
_NO_KERNEL = ("No OpKernel", "Op type not registered")
_WITHOUT = f"export the model without this op: TensorFlow {tf.__version__} cannot run it"


def runs(subject: Subject) -> Iterator[Finding]:
    """The model loads in a v1 session, and every signature answers."""
    probe = subject.probe
    if probe.load_error and any(text in probe.load_error for text in _NO_KERNEL):
        yield Finding("no-kernel", ERROR, "saved_model.pb", probe.load_error, _WITHOUT)
    elif probe.load_error and not any(h.kind == MISSING for h in subject.hazards):
        yield Finding("does-not-load", ERROR, "saved_model.pb", probe.load_error, "export the model again")
    for name, trial in probe.trials.items():
        where = f"signature {name!r}"
        if trial.error is None:
            continue
        if any(text in trial.error for text in _UNSET):
            yield Finding(
                "variables-not-restored", ERROR, where,
                f"it loads, but reads a variable that the restore did not fill: {trial.error}",
                "tf.saved_model.save on a Keras 3 model writes such files: use model.export(), or tfopt-optimize",
            )  # fmt: skip
        elif any(text in trial.error for text in _NO_KERNEL):
            yield Finding("no-kernel", ERROR, where, trial.error, _WITHOUT)
        else:
            yield Finding(
                "signature-fails", WARNING, where, f"none of the inputs that were tried was accepted: {trial.error}",
                "give real rows with --data; if they fail too, so will clients",
            )  # fmt: skip


def names(subject: Subject) -> Iterator[Finding]:
    """Clients find a signature."""
    if not subject.signatures:
        yield Finding(
            "no-signature", ERROR, "saved_model.pb", "the graph has no signature, so that no request can name one",
            "export it with signatures",
        )  # fmt: skip
    elif "serving_default" not in subject.signatures:
        yield Finding(
            "no-default-signature", INFO, "signatures", "there is no 'serving_default': requests must name a signature",
            f"send signature_name: {next(iter(subject.signatures))!r}",
        )  # fmt: skip
    for name in subject.signatures:
        if name.startswith("__"):
            yield Finding(
                "reserved-name", WARNING, f"signature {name!r}", "names that begin with __ are TensorFlow's own",
                "rename it: tools do not show it",
            )  # fmt: skip


def methods(subject: Subject) -> Iterator[Finding]:
    """Signatures of Classify and Regress take serialized tf.Examples, and give what these answer with."""
    for name, signature in subject.signatures.items():
        method, where = signature.method_name, f"signature {name!r}"
        if method not in _METHODS:
            if subject.flags.enable_signature_method_name_check:
                yield Finding(
                    "method-name", ERROR, where, f"its method {method!r} is refused by the method name check",
                    "leave --enable_signature_method_name_check out, or export it as tensorflow/serving/predict",
                )  # fmt: skip
            continue
        if method not in _OUTPUTS:
            continue
        api = method.rsplit("/")[-1].capitalize()
        if [info.dtype for info in signature.inputs.values()] != [tf.string.as_datatype_enum]:
            yield Finding(
                "method-name", WARNING, where, f"{api} sends serialized tf.Examples, and it takes no single string",
                "call it by Predict",
            )  # fmt: skip
        elif not set(signature.outputs) & _OUTPUTS[method]:
            yield Finding(
                "method-name", WARNING, where,
                f"{api} answers with {' or '.join(sorted(_OUTPUTS[method]))}, and it has {sorted(signature.outputs)}",
                "call it by Predict",
            )  # fmt: skip


def sendable(subject: Subject) -> Iterator[Finding]:
    """Inputs are dense tensors: a request cannot hold others."""
    for name, signature in subject.signatures.items():
        for kind, infos in (("input", signature.inputs), ("output", signature.outputs)):
            for key, info in sorted(infos.items()):
                if not info.name:
                    yield Finding(
                        "sparse-tensor", ERROR, f"signature {name!r}: {kind} {key!r}",
                        "is sparse or ragged, and requests and answers hold dense tensors only",
                        "export its components as tensors of their own",
                    )  # fmt: skip


def state(subject: Subject) -> Iterator[Finding]:
    """Answers depend on the request alone."""
    for name, what in subject.state.items():
        yield Finding(
            "state", WARNING, f"signature {name!r}",
            f"it assigns {what}: answers depend on earlier requests, of all clients, and on the replica",
            "make the state an input and an output, or serve one client with one replica"
            + (" without batching" if subject.batches else ""),
        )  # fmt: skip


RULES = (runs, names, methods, sendable, state)
