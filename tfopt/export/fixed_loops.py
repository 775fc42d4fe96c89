"""The shapes inside of loops, once the batch is fixed.

Keras gives the states of a recurrent layer, and the lists that they are read from and written to, an unknown batch,
whatever the batch of the input. Shapes that are only known at run time keep delegates from a whole .tflite file.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfopt.graph import Graph, Shape, infer_shapes, join, split
from tfopt.model import Model
from tfopt.passes import fold_constants, for_each_body
from tfopt.rewrite import Log

_LOOPS = ("While", "StatelessWhile")


def fix_loops(model: Model) -> None:
    """Gives loops and tensor lists the shapes of what they start from, in place, where these are known.

    Args:
      model: whose inputs have fixed shapes.
    """
    while _fix(model):  # the results of one loop are what the next one starts from
        fold_constants.run(model, Log())


def _fix(model: Model) -> int:
    shapes = infer_shapes(model.graph, model.library())
    known: set[tuple[int, ...]] = set()  # of states, and of the elements of lists
    for node in model.graph.nodes.values():
        refs = [join(*split(ref)) for ref in model.graph.data_inputs(node)]
        if node.op in _LOOPS:
            for ref, proto in zip(refs, node.attr["output_shapes"].list.shape, strict=False):
                shape = _known(shapes.get(ref))
                if shape is not None:
                    proto.CopyFrom(tf.TensorShape(shape).as_proto())
                    known.add(shape)
        elif node.op == "TensorListFromTensor" and (shape := _known(shapes.get(refs[0]))):
            known.add(shape[1:])
    return for_each_body(model, lambda graph: _fix_lists(graph, known)) if known else 0


def _known(shape: Shape) -> tuple[int, ...] | None:
    sizes = tuple(size for size in shape or () if size is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else None


def _fix_lists(graph: Graph, known: set[tuple[int, ...]]) -> int:
    count = 0
    for node in list(graph.nodes.values()):
        if not node.op.startswith("TensorList"):
            continue
        for index, ref in enumerate(graph.data_inputs(node)):
            value = graph.constant(ref)
            if value is None or value.ndim != 1 or value.dtype.kind != "i" or value.size < 2 or value[0] != -1:
                continue
            fits = [shape for shape in known if shape[1:] == tuple(value[1:])]
            if len(fits) == 1:
                fixed = graph.add_constant(f"{node.name}/element_shape", np.array(fits[0], value.dtype))
                graph.set_input(node.name, index, fixed)
                count += 1
    return count
