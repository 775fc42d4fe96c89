"""Passes: one technique a file, each a function that edits a model in place and logs what it did."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from tfopt import calibration
from tfopt.clipping import Observed
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.graph import Graph, function_body, function_def
from tfopt.inline import run_grappler
from tfopt.model import Model
from tfopt.variables import new_function_name

MINIMIZE = ("bytes", "latency")
ENGINES = ("graph", "tfmot")
Observe = Callable[[Model, str, Sequence[str], Dataset, bool], dict[str, Observed]]
# What a compression brings about that later passes must not undo: zeros, few distinct values, ranges of fake-quant ops.
INVARIANTS = ("sparsity", "clusters", "ranges")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a pass may learn from.

    Attributes:
      signature: the one that the rows are of.
      teacher: the original model, never edited.
      rows: representative inputs; None where there are none.
      labelled: training rows with labels; None where there are none.
      score: the owner's metric of a model, higher is better; None without evaluation data.
      max_drop: how far the score may fall, in the metric's own units; None where the owner set no bar.
      minimize: what a search is to make least within it: "bytes" or "latency".
      integer_outputs: whether device files are to have integer outputs.
      seed: of everything random.
      checkpoint: a directory of this pass's own, from which a killed run goes on; None where none was asked for.
      observe: `calibration.observe`, or what sees the values of tensors on all rows there are, whichever it is given.
      engine: a `tfopt.tfmot.engine.Engine` that does the work of prune_magnitude, cluster and train_quantized; or None.
    """

    signature: str
    teacher: Model
    rows: Dataset | None = None
    labelled: Dataset | None = None
    score: Callable[[Model], float] | None = None
    max_drop: float | None = None
    minimize: str = "bytes"
    integer_outputs: bool = False
    seed: int = 0
    checkpoint: Path | None = None
    observe: Observe = calibration.observe
    engine: Any = None

    def need_rows(self, name: str) -> Dataset:
        """The representative rows, or the labelled ones, for a pass that cannot do without.

        Raises:
          TfoptError: there are none.
        """
        rows = self.rows or self.labelled
        if rows is None:
            raise TfoptError(f"{name} learns from data: give --representative_data (or --labels)")
        return rows


@dataclasses.dataclass(frozen=True)
class Pass:
    """A technique.

    Attributes:
      name: as in recipes and reports.
      run: edits the model that it is given, and logs what it did and refused. Options come as keyword arguments.
      options: option name -> default; the type of the default is the type that the option must have.
      needs: passes that must have run earlier in a recipe.
      lossless: whether outputs must stay within rounding; such a pass is undone where they do not.
      learns: whether `run` takes `Data` as its third argument.
      device: whether it prepares TFLite files alone: the serving model stays as it was before it.
      files: the TFLite files that it is for: where none of them is made, it is left out. Empty: any.
      makes: which of INVARIANTS it brings about.
      keeps: which of them survive it.
      lossy_with: an option that makes a lossless pass lossy where it is not at its default; "" where there is none.
      requests: whether it changes the inputs of signatures: passes that learn, which feed a model the rows of the
        original one, stand before it, and that it could do nothing is an error.
    """

    name: str
    run: Callable[..., None]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    lossless: bool = True
    learns: bool = False
    device: bool = False
    files: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    lossy_with: str = ""
    requests: bool = False

    def is_lossless(self, options: Mapping[str, Any]) -> bool:
        """Whether outputs must stay within rounding where the pass runs with these options."""
        default = self.options.get(self.lossy_with)
        return self.lossless and options.get(self.lossy_with, default) == default


def for_each_body(model: Model, edit: Callable[[Graph], int]) -> int:
    """Applies an edit to the main body and to every function that it needs.

    A function that changed gets a new name, and its callers are pointed there: TensorFlow refuses two definitions of
    one name in a process.

    Args:
      model: edited in place.
      edit: changes a body and returns how many changes it made.

    Returns:
      The number of changes in all.
    """
    total = edit(model.graph)
    renamed: dict[str, str] = {}
    for name in model.called():
        try:
            body = function_body(model.functions[name], model.functions)
        except ValueError:
            continue  # a polymorphic function stays as it is
        changed = edit(body)
        if changed:
            new = new_function_name(name, model.functions)
            model.functions[new] = function_def(body, model.functions[name], new, model.functions)
            renamed[name] = new
            total += changed
    if renamed:
        _repoint(model, renamed)
    model.functions = {name: model.functions[name] for name in model.called()}
    return total


def _repoint(model: Model, renamed: Mapping[str, str]) -> None:
    """Points every call of a renamed function to its new name; a function that calls one is renamed itself."""
    pending = dict(renamed)
    while pending:
        callers: dict[str, str] = {}
        for name in list(model.functions):
            function = model.functions[name]
            if name in renamed or not any(_calls(node, pending) for node in function.node_def):
                continue
            new = new_function_name(name, model.functions)
            clone = type(function)()
            clone.CopyFrom(function)
            clone.signature.name = new
            model.functions[new] = clone
            callers[name] = new
        renamed = {**renamed, **callers}
        pending = callers
    fresh = set(renamed.values())
    for name in fresh:
        rename_calls(model.functions[name].node_def, renamed)
    rename_calls(model.graph.nodes.values(), renamed)


def _calls(node: NodeDef, names: Mapping[str, str]) -> bool:
    return any(
        (attr.HasField("func") and attr.func.name in names) or any(f.name in names for f in attr.list.func)
        for attr in node.attr.values()
    )


def rename_calls(nodes: Iterable[NodeDef], renamed: Mapping[str, str]) -> None:
    """Replaces function names in the attributes of nodes, in place."""
    for node in nodes:
        for attr in node.attr.values():
            for func in [attr.func] if attr.HasField("func") else list(attr.list.func):
                func.name = renamed.get(func.name, func.name)


def optimize_in_process(model: Model, optimizers: list[str], keep: Iterable[str] = (), **toggles: int) -> None:
    """Runs graph optimizers of TensorFlow itself over a model, in place; weights are Placeholders to them.

    Args:
      model: edited in place.
      optimizers: names as in RewriterConfig.
      keep: nodes computed from constants alone that must stay as they are.
      **toggles: further fields of RewriterConfig.
    """
    graph = model.graph
    meta = MetaGraphDef()
    meta.graph_def.CopyFrom(graph.to_graph_def(model.library()))
    kept = dict.fromkeys([*graph.roots(), *graph.arguments, *keep])
    meta.collection_def["train_op"].node_list.value.extend(name for name in kept if name in graph.nodes)
    result = run_grappler(meta, optimizers, **toggles)
    for node in result.node:
        if node.op == "AddN" and node.attr["N"].i == 2:  # its arithmetic optimizer's; device runtimes are slow at it
            node.op = "AddV2"
            del node.attr["N"]
    nodes = {node.name: node for node in result.node}
    # A preserved node keeps its name, but may have become a constant.
    for name in sorted(graph.reachable(name for name in keep if name in graph.nodes)):
        nodes[name] = graph.nodes[name]
    model.graph = Graph(
        nodes.values(), graph.outputs, keep=graph.keep, arguments=graph.arguments, weights=dict(graph.weights)
    )
    model.graph.sweep()
    model.functions.update({f.signature.name: f for f in result.library.function})
    model.functions = {name: model.functions[name] for name in model.called()}
    model.hoist_constants()


# Every technique is a module of this package that defines PASS.
NAMES = (
    *("prune_graph", "merge_duplicates", "fold_constants", "fold_shapes", "dense_lookups", "fold_affine"),
    *("equalize", "correct_bias", "quantize", "mixed_precision", "train_quantized"),
    *("bfloat16", "int8_weights", "binarize", "distill", "prune_magnitude", "cluster"),
    *("compress_inputs", "compress_embeddings", "prune_channels", "prune_layers", "low_rank"),
    *("compact_signature", "client_lookups", "narrow_inputs", "pack_inputs", "broadcast_inputs"),
)


def get(name: str) -> Pass:
    """The pass of this name.

    Raises:
      TfoptError: there is none.
    """
    if name not in NAMES:
        raise TfoptError(f"unknown pass {name!r}; known passes: {', '.join(NAMES)}")
    return importlib.import_module(f"tfopt.passes.{name}").PASS
