"""A student: another model that takes the place of the original, and is trained to answer as it does.

Its signatures, inputs and outputs get the original's names, so that whoever calls the model sees no difference. What a
training changes is all inside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef, TensorInfo

from tfopt import sources
from tfopt.errors import TfoptError
from tfopt.inline import label, tensor_names
from tfopt.model import Model
from tfopt.model import load as load_model

Names = dict[str, str]


def load(path: str | Path, original: Model) -> tuple[Model, dict[str, tuple[Names, Names]]]:
    """Loads a student in the clothes of the original.

    Args:
      path: a SavedModel directory or a Keras file.
      original: whose signatures it gets.

    Returns:
      The student, and by signature of the original what the student calls its inputs and outputs: its name -> the
      original's.

    Raises:
      TfoptError: no such model, or its signatures are not the original's.
    """
    with tempfile.TemporaryDirectory(prefix="tfopt-student-") as work:
        saved = sources.as_saved_model(path, workdir=work)
        student = load_model(saved)
        if student.assets and saved != Path(path):
            raise TfoptError(
                f"distill: student={path} brings files of its own ({student.assets[0].filename}): export it as a "
                "SavedModel, and give that"
            )
    return student, dress(student, original, str(path))


def dress(student: Model, original: Model, path: str) -> dict[str, tuple[Names, Names]]:
    """Gives a student the signatures of the original, in place; see `load`."""
    own = dict(student.signatures)
    names, outputs, signatures = {}, {}, {}
    for name, target in original.signatures.items():
        # Where it has none of that name, any that fits: Keras 3 exports one function as two signatures.
        theirs, (inputs, results) = _counterpart(own, name, target, path)
        source = own[theirs]
        definition = SignatureDef(method_name=target.method_name)
        for its, given in inputs.items():
            definition.inputs[given].CopyFrom(source.inputs[its])
        for its, given in results.items():
            definition.outputs[given].CopyFrom(source.outputs[its])
            for component, _ in tensor_names(source.outputs[its]):
                outputs[label(name, given, component)] = student.graph.outputs[label(theirs, its, component)]
        signatures[name], names[name] = definition, (inputs, results)
    student.signatures, student.graph.outputs = signatures, outputs
    student.graph.sweep()
    return names


def _counterpart(
    own: Mapping[str, SignatureDef], name: str, target: SignatureDef, path: str
) -> tuple[str, tuple[Names, Names]]:
    """The student's signature that can stand for one of the original, and what becomes of its names."""
    problems = []
    for theirs in [name] if name in own else sorted(own, key=lambda key: (key != "serving_default", key)):
        where = f"distill: student={path}, signature {theirs!r}"
        try:
            inputs = _match(own[theirs].inputs, target.inputs, f"{where}: input")
            return theirs, (inputs, _match(own[theirs].outputs, target.outputs, f"{where}: output"))
        except TfoptError as error:
            problems.append(error)
    if name in own or len(own) == 1:
        raise problems[0]
    raise TfoptError(
        f"distill: student={path} has the signatures {', '.join(sorted(own))}, and none fits {name!r} of the model "
        f"({problems[0]}); --signatures leaves it out"
    )


def _match(own: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], where: str) -> Names:
    """The student's names -> the original's: equal names, else the only one of its kind, else in order."""
    rest, left = dict(sorted(wanted.items())), dict(sorted(own.items()))
    found = {name: name for name in rest if name in left and _alike(left[name], rest[name])}
    for name in found:
        del rest[name], left[name]
    for name, info in list(rest.items()):
        fitting = [its for its, other in left.items() if _alike(other, info)]
        if not fitting:
            has = ", ".join(f"{its} {_text(own[its])}" for its in sorted(own)) or "none"
            raise TfoptError(f"{where} {name!r} of the model, {_text(info)}, has no counterpart; it has {has}")
        found[fitting[0]] = name
        del left[fitting[0]]
    if left:
        raise TfoptError(
            f"{where} {min(left)!r} has no counterpart in the model, which has {', '.join(sorted(wanted))}"
        )
    return found


def _alike(its: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether a tensor can stand for another: of its dtype, and of a shape that takes whatever fits that one."""
    if its.dtype != wanted.dtype or its.WhichOneof("encoding") != wanted.WhichOneof("encoding"):
        return False
    if its.tensor_shape.unknown_rank or wanted.tensor_shape.unknown_rank:
        return True
    a, b = ([dim.size for dim in info.tensor_shape.dim] for info in (its, wanted))
    return len(a) == len(b) and all(x in (-1, y) for x, y in zip(a, b, strict=True))


def _text(info: TensorInfo) -> str:
    shape = info.tensor_shape
    sizes = "of any rank" if shape.unknown_rank else str([None if d.size < 0 else d.size for d in shape.dim])
    return f"{tf.as_dtype(info.dtype).name} {sizes}"
