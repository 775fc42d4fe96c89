"""Counts the nodes that a signature needs, and the affine nodes left among them, in any GraphDef.

It knows nothing of who made the graph. A node is an affine leftover when it is

- a batch norm (FusedBatchNorm*, BatchNormWithGlobalNormalization), or
- a floating point Mul, Add, Sub, RealDiv or BiasAdd of a non-constant by a constant that is a scalar or has one
  dimension only (per channel), and it is not the one bias of a linear op.

"Constant" is anything computed from constants and from variables that nothing reached assigns, through function
calls and into loop bodies where the value is loop-invariant. An addition is a linear op's bias when only shape
changes, Identity, or a sum with other values lie between the two, and no other addition took that place before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorflow.core.framework import graph_pb2
from tensorflow.python.framework import op_def_registry

_SCALAR, _VECTOR, _OTHER, _VARYING = 0, 1, 2, 3  # what a value is: a constant of some extent, or no constant

_LINEAR = {
    "Conv2D",
    "Conv3D",
    "Conv",
    "DepthwiseConv2dNative",
    "Conv2DBackpropInput",
    "Conv3DBackpropInput",
    "Conv3DBackpropInputV2",
    "MatMul",
    "BatchMatMul",
    "BatchMatMulV2",
    "BatchMatMulV3",
    "SparseMatMul",
    "Einsum",
}
_BATCH_NORMS = {
    "FusedBatchNorm",
    "FusedBatchNormV2",
    "FusedBatchNormV3",
    "BatchNormWithGlobalNormalization",
    "_FusedBatchNormEx",
}
_ADDITIONS = {"Add", "AddV2", "BiasAdd", "BiasAddV1", "Sub"}
_SCALINGS = {"Mul", "Div", "RealDiv"}
_IDENTITIES = {"Identity", "Snapshot", "StopGradient", "PreventGradient", "CheckNumerics", "ReadVariableOp"}
_KEEP_EXTENT = _IDENTITIES | {"Cast", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Rsqrt", "Sqrt", "Square"}
_KEEP_EXTENT |= {"Neg", "Reciprocal", "Inv", "Exp", "Log", "Softplus", "Abs", "LogicalNot", "ZerosLike", "OnesLike"}
_ELEMENTWISE = {"Add", "AddV2", "Sub", "Mul", "Div", "RealDiv", "DivNoNan", "Maximum", "Minimum", "Pow", "BiasAdd"}
_ELEMENTWISE |= {"Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "Select", "SelectV2"}
_ELEMENTWISE |= {"LogicalAnd", "LogicalOr", "SquaredDifference"}
_SHAPE_CHANGES = {"Identity", "Reshape", "Squeeze", "ExpandDims", "Transpose", "BatchToSpaceND", "Snapshot"}
_FLOATS = {1, 2, 14, 19}  # float32, float64, bfloat16, float16


@dataclass
class Counts:
    """What one signature needs: `nodes`, and `leftovers` as (function or "", node, op)."""

    nodes: int = 0
    leftovers: list[tuple[str, str, str]] = field(default_factory=list)


class _Body:
    """One graph body, main or function, with the nodes that its results reach, operands first."""

    def __init__(self, name, nodes, results, arguments=()):
        self.name = name
        self.by_name = {node.name: node for node in nodes}
        self.arguments = {argument: index for index, argument in enumerate(arguments)}
        self.order = self._reached(results)
        self.assigned = {self.root(node.input[0]) for node in self.order if node.op.startswith("Assign") and node.input}

    def _reached(self, results):
        order, seen = [], set()
        stack = [(_node_of(result), False) for result in results]
        while stack:
            name, done = stack.pop()
            if done:
                order.append(self.by_name[name])
            elif name in self.by_name and name not in seen:
                seen.add(name)
                stack.append((name, True))
                stack.extend((_node_of(operand), False) for operand in self.by_name[name].input)
        return order

    def root(self, reference):
        """Follows identities back to the node or argument that a reference comes from."""
        name = _node_of(reference)
        while name in self.by_name and self.by_name[name].op in _IDENTITIES and self.by_name[name].input:
            name = _node_of(self.by_name[name].input[0])
        return name


def _node_of(reference: str) -> str:
    return reference.lstrip("^").split(":")[0]


def _port_of(reference: str) -> int:
    last = reference.rsplit(":", 1)
    return int(last[1]) if len(last) == 2 and last[1].isdigit() else 0


def _extent(dimensions) -> int:
    return min(sum(size != 1 for size in dimensions), _OTHER)


class _Counter:
    def __init__(self, graph: graph_pb2.GraphDef):
        self.functions = {function.signature.name: function for function in graph.library.function}
        self.bodies: dict[str, _Body] = {}
        self.leftovers: dict[tuple[str, str], str] = {}
        self.results: dict[tuple, list[int]] = {}

    def body(self, name: str) -> _Body:
        if name not in self.bodies:
            function = self.functions[name]
            results = [*function.ret.values(), *function.control_ret.values()]
            arguments = [argument.name for argument in function.signature.input_arg]
            self.bodies[name] = _Body(name, function.node_def, results, arguments)
        return self.bodies[name]

    def call(self, name: str, arguments: list[int]) -> list[int]:
        """Returns what the results of a function are, given what its arguments are."""
        if name not in self.functions:
            return []
        key = (name, tuple(arguments))
        if key not in self.results:
            self.results[key] = []  # a recursive call sees no result, hence varying
            function, body = self.functions[name], self.body(name)
            values = self.run(body, arguments)
            self.results[key] = [
                self.value(body, values, function.ret[result.name], arguments)
                for result in function.signature.output_arg
            ]
        return self.results[key]

    def value(self, body, values, reference, arguments) -> int:
        name = _node_of(reference)
        if name in body.arguments and name not in body.by_name:
            index = body.arguments[name]
            return arguments[index] if index < len(arguments) and name not in body.assigned else _VARYING
        ports = values.get(name)
        if ports is None:
            return _VARYING
        port = _port_of(reference)
        return ports[port] if port < len(ports) else ports[0] if len(ports) == 1 else _VARYING

    def run(self, body: _Body, arguments: list[int]) -> dict[str, list[int]]:
        """Evaluates one body; adds its leftovers; returns what each node's outputs are."""
        values: dict[str, list[int]] = {}
        taken: set[str] = set()  # linear ops that have their bias
        for node in body.order:
            data = [x for x in node.input if not x.startswith("^")]
            operands = [self.value(body, values, x, arguments) for x in data]
            values[node.name] = self.outputs(body, node, operands)
            if self.is_leftover(body, node, data, operands, taken):
                self.leftovers[body.name, node.name] = node.op
        return values

    def outputs(self, body: _Body, node, operands: list[int]) -> list[int]:
        called = [a.func.name for a in node.attr.values() if a.HasField("func")]
        called += [f.name for a in node.attr.values() for f in a.list.func]
        if node.op in ("PartitionedCall", "StatefulPartitionedCall"):
            return self.call(node.attr["f"].func.name, operands)
        if node.op in self.functions:
            return self.call(node.op, operands)
        if node.op in ("While", "StatelessWhile"):
            function = self.functions[node.attr["body"].func.name]
            inner = self.body(function.signature.name)
            names = [argument.name for argument in function.signature.input_arg]
            kept = [
                inner.root(function.ret[result.name]) == name
                for name, result in zip(names, function.signature.output_arg, strict=True)
            ]
            operands = [x if keep else _VARYING for x, keep in zip(operands, kept, strict=True)]
            for name in called:
                self.call(name, operands)
            return operands or [_VARYING]
        if called:
            for name in called:
                self.call(name, operands[1:] if node.op in ("If", "StatelessIf", "Case", "StatelessCase") else [])
            return [_VARYING]
        if node.op == "Const":
            return [_extent(d.size for d in node.attr["value"].tensor.tensor_shape.dim)]
        if node.op in ("VarHandleOp", "VariableV2", "Variable"):
            state = node.name in body.assigned
            return [_VARYING if state else _extent(d.size for d in node.attr["shape"].shape.dim)]
        if node.op in ("Placeholder", "PlaceholderWithDefault") or not operands:
            return [_VARYING]
        if node.op == "Enter":
            return [operands[0] if node.attr["is_constant"].b else _VARYING]
        if node.op in ("Merge", "Switch", "NextIteration") or _VARYING in operands:
            return [_VARYING]
        if node.op in _KEEP_EXTENT:
            return [operands[0]]
        definition = op_def_registry.get(node.op)
        if definition is None or (definition.is_stateful and node.op != "ReadVariableOp"):
            return [_VARYING]
        return [max(operands) if node.op in _ELEMENTWISE else _OTHER]

    def is_leftover(self, body, node, data, operands, taken) -> bool:
        if node.op in _BATCH_NORMS:
            return True
        if node.op not in _ADDITIONS | _SCALINGS or node.attr["T"].type not in _FLOATS:
            return False
        left, right = operands
        if (left == _VARYING) == (right == _VARYING) or min(left, right) > _VECTOR:
            return False
        if node.op in ("Div", "RealDiv") and left != _VARYING:
            return False  # c / x is not affine
        if node.op in _SCALINGS or (node.op == "Sub" and left != _VARYING):
            return True
        linear = self.unbiased(body, data[0] if left == _VARYING else data[1], taken)
        taken.add(linear)
        return linear is None

    def unbiased(self, body, reference, taken) -> str | None:
        """Returns the linear op, not yet with a bias, whose bias an addition to `reference` is."""
        pending = [_node_of(reference)]
        for _ in range(64):
            if not pending:
                return None
            node = body.by_name.get(pending.pop())
            if node is None:
                continue
            if node.op in _LINEAR and node.name not in taken:
                return node.name
            if node.op in _SHAPE_CHANGES:
                pending.append(_node_of(node.input[0]))
            elif node.op in ("Add", "AddV2"):
                pending += [_node_of(x) for x in node.input[1::-1]]
            elif node.op == "AddN":
                pending += [_node_of(x) for x in node.input if not x.startswith("^")]
        return None


def count(graph: graph_pb2.GraphDef, outputs: list[str]) -> Counts:
    """Counts what the tensors `outputs` ("name:0") need; each function body once however often it is called."""
    counter = _Counter(graph)
    main = _Body("", graph.node, outputs)
    counter.run(main, [])
    reached = {main.name: main} | {name: counter.bodies[name] for name in {key[0] for key in counter.results}}
    leftovers = [(body, node, op) for (body, node), op in counter.leftovers.items()]
    return Counts(sum(len(body.order) for body in reached.values()), sorted(leftovers))
