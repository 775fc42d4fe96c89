"""Inputs in the place of a SequenceExample's feature lists: steps of one shape, filled up; or values of any number.

Sparse lists are values X (rows, steps, width), filled up, with a mask M of what is there: indices = Where(M), values =
GatherNd(X, indices), shape = [rows, steps, width]. Ragged ones are the parser's own three tensors: a client makes them
as easily as any other form.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfopt.feature_spec import Feature
from tfopt.graph import Graph, join
from tfopt.serving.sparse_inputs import Form, placeholder


def lists(graph: Graph, feature: Feature, parser: str) -> Form:
    """Replaces feature lists of any kind; the graph is edited in place.

    Args:
      graph: edited in place.
      feature: of the kind "lists", "sparse_lists" or "ragged_lists".
      parser: the parsing node.
    """
    described: dict[str, Any] = {"dtype": feature.dtype.name, "shape": None, "list": True}
    parts = {part: join(parser, port) for part, port in feature.ports.items()}
    if feature.kind == "lists":
        names = {"values": feature.name, "lengths": f"{feature.name}_lengths"}
        shapes: dict[str, tuple[int, ...]] = {"values": (-1, -1, *feature.shape), "lengths": (-1,)}
        dtypes = {"values": feature.dtype, "lengths": tf.int64}
        step = {"step": "stack", "input": feature.name, "lengths": names["lengths"], "shape": list(feature.shape)}
    elif feature.kind == "ragged_lists":
        names = {"values": feature.name, **{p: f"{feature.name}_{p}_splits" for p in ("outer", "inner")}}
        splits = feature.splits_dtype or tf.int64
        shapes = dict.fromkeys(names, (-1,))
        dtypes = {"values": feature.dtype, "outer": splits, "inner": splits}
        step = {"step": "nest", "input": feature.name, "outer": names["outer"], "inner": names["inner"]}
        step["dtype"] = splits.name
    else:
        return _masked(graph, feature, parts, described)
    inputs = {}
    for part, name in names.items():
        inputs[name] = placeholder(graph, name, dtypes[part], shapes[part]), shapes[part]
        graph.redirect(parts[part], inputs[name][0])
    return Form(inputs, described, step)


def _masked(graph: Graph, feature: Feature, parts: dict[str, str], described: dict[str, Any]) -> Form:
    shape = (-1, -1, -1)
    x = placeholder(graph, feature.name, feature.dtype, shape)
    mask = placeholder(graph, f"{feature.name}_mask", tf.bool, shape)
    indices = graph.add_op(f"{x}/indices", "Where", [mask], T=tf.bool)
    values = graph.add_op(f"{x}/values", "GatherNd", [x, indices], Tparams=feature.dtype, Tindices=tf.int64)
    graph.redirect(parts["indices"], indices)
    graph.redirect(parts["values"], values)
    graph.redirect(parts["shape"], graph.add_op(f"{x}/shape", "Shape", [x], T=feature.dtype, out_type=tf.int64))
    step = {"step": "pad_lists", "input": feature.name, "mask": f"{feature.name}_mask"}
    return Form({feature.name: (x, shape), f"{feature.name}_mask": (mask, shape)}, described, step)
