"""Fixes the batch for devices: shapes become known, and the arithmetic on shapes folds away."""

from __future__ import annotations

import tensorflow as tf

from tfopt.export.fixed_loops import fix_loops
from tfopt.graph import infer_shapes, split
from tfopt.inline import label, tensor_names
from tfopt.model import Model
from tfopt.passes import fold_constants, merge_duplicates
from tfopt.rewrite import Log


def fix_batch(model: Model, batch: int) -> Model:
    """A copy of a model whose inputs have a known first dimension.

    Args:
      model: left as it is.
      batch: replaces every unknown first dimension of an input.

    Returns:
      The copy, with the shapes of its signatures brought up to date.
    """
    fixed = model.copy()
    for signature in fixed.signatures.values():
        for info in signature.inputs.values():
            for component, tensor in tensor_names(info):
                if component:  # the rows of a component are values, not examples
                    continue
                shape = fixed.graph.producer(tensor).attr["shape"].shape
                if shape.unknown_rank or not shape.dim:
                    shape = info.tensor_shape
                if not shape.unknown_rank and shape.dim:  # fixed already where another signature has the same input
                    first = shape.dim[0].size
                    known = [batch if first < 0 else first, *(d.size for d in shape.dim[1:])]
                    proto = tf.TensorShape([None if d < 0 else d for d in known]).as_proto()
                    fixed.graph.producer(tensor).attr["shape"].shape.CopyFrom(proto)
                    info.tensor_shape.CopyFrom(proto)
    fold_constants.run(fixed, Log())
    merge_duplicates.run(fixed, Log())
    fix_loops(fixed)
    shapes = infer_shapes(fixed.graph, fixed.library())
    for name, signature in fixed.signatures.items():
        for output, info in signature.outputs.items():
            for component, _ in tensor_names(info):
                ref = fixed.graph.outputs[label(name, output, component)]
                known_shape = shapes.get(ref if split(ref)[1] else split(ref)[0])
                if known_shape is not None and not component:
                    info.tensor_shape.CopyFrom(tf.TensorShape(known_shape).as_proto())
    return fixed
