"""What a graph could do besides computing: files, Python, connections, code of others.

The whole file is searched, as it was saved: the main graph and every function of its library, also those that no
signature calls. Nothing is loaded and nothing runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from tfopt.graph import called_functions, op_def
from tfopt.inline import INIT_SIGNATURE, TRAIN_SIGNATURE, tensor_names

PYTHON = "runs Python"
CODE = "runs foreign native code"
NETWORK = "opens connections"
WRITES = "writes files"
READS = "reads files"
MISSING = "needs an op that TensorFlow does not have"

# What an op does, and which of its inputs is the path or address (None: it has none). "Experimental" before a name, and
# V2, V3, ... after it, are left out.
_OPS: dict[str, tuple[str, int | None]] = {
    **dict.fromkeys(("PyFunc", "PyFuncStateless", "EagerPyFunc", "NumpyPyFunc"), (PYTHON, None)),
    **dict.fromkeys(("XlaCustomCall", "XlaCallModule"), (CODE, None)),
    **dict.fromkeys(("RpcClient", "RpcServer"), (NETWORK, 0)),
    **dict.fromkeys(
        ("RpcCall", "RpcServerStart", "RpcServerRegister", "RemoteCall", "WorkerHeartbeat"), (NETWORK, None)
    ),
    **dict.fromkeys(("Send", "Recv", "_Send", "_Recv", "_HostSend", "_HostRecv"), (NETWORK, None)),
    **dict.fromkeys(
        ("CollectiveBcastSend", "CollectiveBcastRecv", "CollectiveReduce", "CollectiveGather"), (NETWORK, None)
    ),
    "CollectiveInitializeCommunicator": (NETWORK, None),
    "DataServiceDataset": (NETWORK, 2),
    "RegisterDataset": (NETWORK, 1),
    **dict.fromkeys(("WriteFile", "Save", "SaveSlices", "MergeV2Checkpoints", "DistributedSave"), (WRITES, 0)),
    "SaveDataset": (WRITES, 1),
    "DatasetToTFRecord": (WRITES, 1),
    "CacheDataset": (WRITES, 1),
    "SnapshotDataset": (WRITES, 1),
    "CreateSummaryFileWriter": (WRITES, 1),
    "CreateSummaryDbWriter": (WRITES, 1),
    "CalibrationStatisticsSaver": (WRITES, None),
    "StoreMinibatchStatisticsInFdo": (WRITES, None),
    **dict.fromkeys(("ReadFile", "MatchingFiles", "MatchingFilesDataset", "Restore", "RestoreSlice"), (READS, 0)),
    **dict.fromkeys(("TFRecordDataset", "TextLineDataset", "FixedLengthRecordDataset", "CSVDataset"), (READS, 0)),
    **dict.fromkeys(("LMDBDataset", "LoadDataset", "LoadAndRemapMatrix", "GenerateVocabRemapping"), (READS, 0)),
    **dict.fromkeys(("InitializeTableFromTextFile", "SqlDataset"), (READS, 1)),
    **dict.fromkeys(("SnapshotDatasetReader", "SnapshotNestedDatasetReader"), (READS, None)),
    **dict.fromkeys(("WholeFileReader", "TextLineReader", "FixedLengthRecordReader", "TFRecordReader"), (READS, None)),
    **dict.fromkeys(("LMDBReader", "RecordInput", "FileSystemSetConfiguration"), (READS, None)),
}
_SAVER_OPS = ("Save", "SaveSlices", "Restore", "RestoreSlice", "MergeV2Checkpoints")
_SAVER = ("saving", "restoring")
_ORDER = (PYTHON, CODE, NETWORK, WRITES, READS, MISSING)


@dataclasses.dataclass(frozen=True)
class Hazard:
    """One node that does more than compute.

    Attributes:
      kind: what it does.
      op: its op.
      node: its name.
      function: the function that it is in; None for the main graph.
      used_by: signatures, "initialization", "saving" and "restoring" that run it; empty where only a caller of the
        function from Python would.
      detail: the path or address, as far as the graph tells it.
    """

    kind: str
    op: str
    node: str
    function: str | None
    used_by: tuple[str, ...]
    detail: str = ""

    @property
    def routine(self) -> bool:
        """Whether it is what every SavedModel has: saving and restoring its own checkpoint."""
        return _stem(self.op) in _SAVER_OPS and bool(self.used_by) and set(self.used_by) <= set(_SAVER)


def scan(meta: MetaGraphDef) -> list[Hazard]:
    """Finds every node that does more than compute, the worst first.

    Args:
      meta: the model as it was saved.
    """
    return sorted(_Search(meta).hazards(), key=lambda h: (_ORDER.index(h.kind), not h.used_by, h.op, h.node))


def _stem(op: str) -> str:
    return re.sub(r"V\d+$", "", op.removeprefix("Experimental"))


def _name(ref: str) -> str:
    return ref.lstrip("^").split(":")[0]


class _Search:
    """The bodies of a model, and who calls which."""

    def __init__(self, meta: MetaGraphDef):
        self.meta = meta
        self.functions = {f.signature.name: f for f in meta.graph_def.library.function}
        self.bodies: dict[str | None, dict[str, NodeDef]] = {None: {n.name: n for n in meta.graph_def.node}}
        self.bodies.update({name: {n.name: n for n in f.node_def} for name, f in self.functions.items()})
        self.assets = {_name(asset.tensor_info.name): asset.filename for asset in meta.asset_file_def}
        self.callers: dict[str, list[tuple[str | None, NodeDef]]] = {}
        for body, nodes in self.bodies.items():
            for node in nodes.values():
                for function in self.called(node):
                    self.callers.setdefault(function, []).append((body, node))

    def called(self, node: NodeDef) -> list[str]:
        return [f for f in [*called_functions(node), node.op] if f in self.functions]

    def hazards(self) -> Iterator[Hazard]:
        reached = {user: self.reach(roots) for user, roots in self.roots()}
        for body, nodes in self.bodies.items():
            for node in nodes.values():
                found = self.judge(node, body)
                if found is not None:
                    users = [user for user, reach in reached.items() if (body or node.name) in reach[body is not None]]
                    kind, detail = found
                    yield Hazard(kind, node.op, node.name, body, tuple(users), detail)

    def roots(self) -> Iterator[tuple[str, list[str]]]:
        meta = self.meta
        initial: list[str] = []
        for name, signature in sorted(meta.signature_def.items()):
            nodes = [_name(t) for info in signature.outputs.values() for _, t in tensor_names(info)]
            if name == INIT_SIGNATURE:
                initial += nodes
            elif name != TRAIN_SIGNATURE and nodes:
                yield name, nodes
        for collection in ("saved_model_main_op", "legacy_init_op"):
            if collection in meta.collection_def:
                initial += map(_name, meta.collection_def[collection].node_list.value)
        yield "initialization", initial
        yield "saving", [_name(meta.saver_def.save_tensor_name)]
        yield "restoring", [_name(meta.saver_def.restore_op_name)]

    def reach(self, roots: Iterable[str]) -> tuple[set[str], set[str]]:
        """The nodes of the main graph, and the functions, that run when `roots` run."""
        main, stack = set(), list(roots)
        functions: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in main and name in self.bodies[None]:
                main.add(name)
                stack += map(_name, self.bodies[None][name].input)
        stack = [f for name in main for f in self.called(self.bodies[None][name])]
        while stack:
            name = stack.pop()
            if name not in functions:
                functions.add(name)
                stack += [f for node in self.functions[name].node_def for f in self.called(node)]
        return main, functions

    def judge(self, node: NodeDef, body: str | None) -> tuple[str, str] | None:
        """(kind, detail) of a node; None where it only computes."""
        if node.op not in self.functions and op_def(node.op) is None:
            return MISSING, "a library of custom ops would have to be loaded"
        if node.op == "PrintV2" and node.attr["output_stream"].s.startswith(b"file://"):
            return WRITES, _quoted(node.attr["output_stream"].s)
        if node.op.startswith("Debug") and node.attr["debug_urls"].list.s:
            urls = node.attr["debug_urls"].list.s
            return NETWORK if any(u.startswith(b"grpc") for u in urls) else WRITES, ", ".join(map(_quoted, urls))
        kind, place = _OPS.get(_stem(node.op), (None, None))
        if kind is None:
            return None
        if kind == PYTHON:
            return kind, "works only in the process that made it"
        data = [ref for ref in node.input if not ref.startswith("^")]
        if place is None or place >= len(data):
            return kind, ""
        asset, text = self.trace(data[place], body)
        if asset and kind == READS:
            return None  # its own asset, which comes with the model
        return None if node.op.startswith("CacheDataset") and text == "''" else (kind, text)

    def trace(self, ref: str, body: str | None, depth: int = 0) -> tuple[bool, str]:
        """Where a string comes from: (whether it is the path of an asset, the text or its source in words)."""
        name = _name(ref)
        node = self.bodies[body].get(name)
        if body is None and name in self.assets:
            return True, f"asset {_quoted(self.assets[name].encode())}"
        if node is None and body is not None and depth < 20:
            arguments = [arg.name for arg in self.functions[body].signature.input_arg]
            sites = self.callers.get(body, [])
            index = arguments.index(name) if name in arguments else -1
            found = {self.trace(n.input[index], b, depth + 1) for b, n in sites if 0 <= index < len(n.input)}
            if len(found) == 1:
                return found.pop()
        if node is None or node.op in ("Placeholder", "PlaceholderWithDefault"):
            return False, "a name that comes from outside"
        if node.op in ("Identity", "StringJoin", "ShardedFilename", "ExpandDims", "Reshape", "Pack") and depth < 20:
            return self.trace(node.input[0], body, depth + 1)
        if node.op == "ReadVariableOp" and body is None:
            written = self.assigned(_name(node.input[0]))
            if written is not None:
                return self.trace(written, body, depth + 1)
        if node.op == "Const":
            values: Sequence[bytes] = node.attr["value"].tensor.string_val
            return False, ", ".join(map(_quoted, values[:3])) + (", ..." if len(values) > 3 else "")
        return False, f"a name that {node.op} {name!r} computes"

    def assigned(self, handle: str) -> str | None:
        """The one value that a variable of the main graph is ever assigned: TF 2 hands its assets on in variables."""
        users = [n for n in self.bodies[None].values() if handle in map(_name, n.input)]
        values = [n.input[1] for n in users if n.op == "AssignVariableOp"]
        known = all(n.op in ("AssignVariableOp", "ReadVariableOp", "VarIsInitializedOp", "NoOp") for n in users)
        return values[0] if known and len(values) == 1 else None


def _quoted(text: bytes) -> str:
    return repr(text.decode(errors="backslashreplace"))
