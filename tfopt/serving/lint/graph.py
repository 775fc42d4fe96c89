"""Facts of signatures: whether requests to them can be batched, the ops behind each, the state that they assign."""

from __future__ import annotations

from collections.abc import Iterator

from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef, SignatureDef

from tfopt.graph import called_functions, split
from tfopt.inline import label, tensor_names
from tfopt.model import Model

# Ops that change what a later call sees. A table that is filled while it initialises is none of them.
_WRITES = (
    *("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "AssignVariableXlaConcatND"),
    *("ResourceScatter", "ResourceApply", "ResourceSparseApply", "ResourceStridedSliceAssign", "ResourceCountUpTo"),
    *("LookupTableInsert", "LookupTableRemove", "LookupTableImport", "LookupTableExport"),
    *("Stack", "QueueEnqueue", "QueueDequeue", "BarrierInsert", "StagingArea", "Stage", "Unstage"),
)
_READS = ("LookupTableExport",)
_MUST_COMPILE = "_XlaMustCompile"


def signature_nodes(model: Model, signature: str) -> Iterator[NodeDef]:
    """Every node that a signature runs, those of branches and loop bodies included."""
    outputs = [
        model.graph.outputs[label(signature, name, component)]
        for name, info in model.signatures[signature].outputs.items()
        for component, _ in tensor_names(info)
    ]
    functions = {f.signature.name: f for f in model.library()}
    pending = []
    for name in model.graph.reachable([split(t)[0] for t in outputs]):
        node = model.graph.nodes[name]
        yield node
        pending += called_functions(node)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in seen and name in functions:
            seen.add(name)
            for node in functions[name].node_def:
                yield node
                pending += [*called_functions(node), node.op]


def assigned_state(model: Model) -> dict[str, str]:
    """The signatures that change what a later call answers: name -> the first op that does, in words."""
    found = {}
    for name in model.signatures:
        for node in signature_nodes(model, name):
            if node.op.startswith(_WRITES) and not node.op.startswith(_READS):
                found[name] = f"state ({node.op} {node.name!r})"
                break
    return found


def unbatchable(signature: SignatureDef) -> list[tuple[str, str]]:
    """Why a batching TensorFlow Serving would fail requests to a signature: (input or output, reason).

    It concatenates all inputs of several requests along dimension 0, runs once, and splits all outputs by rows.
    """
    if not signature.inputs:
        return [("", "has no input, and a batch is made of the rows of inputs")]
    found = []
    for name, info in sorted(signature.inputs.items()):
        dims = [d.size for d in info.tensor_shape.dim]
        if not info.name:
            found.append((f"input {name!r}", "is sparse or ragged, and cannot be sent"))
        elif not dims and not info.tensor_shape.unknown_rank:
            found.append((f"input {name!r}", "is a scalar: requests cannot be joined along its dimension 0"))
        elif dims and dims[0] >= 0:
            found.append(
                (f"input {name!r}", f"has {dims[0]} row{'s' * (dims[0] != 1)} by its shape, and batches have others")
            )
    for name, info in sorted(signature.outputs.items()):
        dims = [d.size for d in info.tensor_shape.dim]
        if not dims and not info.tensor_shape.unknown_rank and info.name:
            found.append((f"output {name!r}", "is a scalar: it cannot be split over the requests of a batch"))
        elif dims and dims[0] >= 0 and not any(where.startswith("input") for where, _ in found):
            found.append((f"output {name!r}", f"has {dims[0]} row{'s' * (dims[0] != 1)} whatever the batch is"))
    return found


def must_compile(meta: MetaGraphDef) -> list[str]:
    """Functions, or else nodes, that were made with jit_compile=True: they run by XLA or not at all."""
    library = meta.graph_def.library.function
    if found := [f.signature.name for f in library if _MUST_COMPILE in f.attr and f.attr[_MUST_COMPILE].b]:
        return found
    nodes = [node for body in (meta.graph_def.node, *(f.node_def for f in library)) for node in body]
    return [node.name for node in nodes if _MUST_COMPILE in node.attr and node.attr[_MUST_COMPILE].b]
