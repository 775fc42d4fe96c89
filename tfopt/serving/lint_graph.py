"""What the signatures of a model run: the ops behind each, and the state that they assign."""

from __future__ import annotations

from collections.abc import Iterator

from tensorflow.core.framework.node_def_pb2 import NodeDef

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
