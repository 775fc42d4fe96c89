"""Reading and editing one graph body: the main GraphDef of a model, or one FunctionDef of its library.

Both kinds of body are held in the same form, so that a rewrite need not know which one it edits: nodes by name, inputs
written as GraphDef references (`name`, `name:1`, `^name`), arguments as Placeholder nodes, and results as a dict from a
label to a reference. All edits go through methods, which keep the consumers of every node known at every moment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.framework.op_def_pb2 import OpDef

# A constant of at least this many elements is a weight: it leaves the graph for the dict of arrays.
WEIGHT_ELEMENTS = 1024


def split(ref: str) -> tuple[str, int]:
    """Splits a reference into (node name, output port); the port of a control reference `^name` is -1."""
    if ref.startswith("^"):
        return ref[1:], -1
    name, colon, port = ref.rpartition(":")
    return (name, int(port)) if colon else (ref, 0)


def join(name: str, port: int = 0) -> str:
    """The reference to output `port` of node `name`, in its shortest form; -1 gives the control reference."""
    return f"^{name}" if port < 0 else name if port == 0 else f"{name}:{port}"


@functools.lru_cache(maxsize=1)
def _op_graph() -> tf.Graph:
    return tf.Graph()


@functools.lru_cache(maxsize=4096)
def op_def(op: str) -> OpDef | None:
    """The OpDef registered for `op`, or None where TensorFlow does not know it."""
    try:
        return _op_graph().op_def_for_type(op)
    except (ValueError, KeyError, RuntimeError, tf.errors.OpError):
        return None


def make_node(name: str, op: str, inputs: Iterable[str] = (), **attrs: object) -> NodeDef:
    """Builds a NodeDef; attribute values are Python ints, floats, bools, strs, DTypes, shapes (tuples) or int lists."""
    node = NodeDef(name=name, op=op, input=list(inputs))
    for key, value in attrs.items():
        set_attr(node, key, value)
    return node


def set_attr(node: NodeDef, key: str, value: object) -> None:
    """Sets one attribute from a Python value (see `make_node`); AttrValue protos are copied as they are."""
    attr = node.attr[key]
    if isinstance(value, type(attr)):
        attr.CopyFrom(value)
    elif isinstance(value, bool):
        attr.b = value
    elif isinstance(value, int):
        attr.i = value
    elif isinstance(value, float):
        attr.f = value
    elif isinstance(value, str):
        attr.s = value.encode()
    elif isinstance(value, tf.DType):
        attr.type = value.as_datatype_enum
    elif isinstance(value, tuple):
        attr.shape.CopyFrom(tf.TensorShape(value).as_proto())
    elif isinstance(value, list):
        attr.list.i.extend(value)
    else:
        raise TypeError(f"attribute {key!r} of {node.name!r}: cannot hold {value!r}")


def const_node(name: str, array: np.ndarray) -> NodeDef:
    """A Const node that holds `array`."""
    array = np.asarray(array)
    node = NodeDef(name=name, op="Const")
    node.attr["dtype"].type = tf.as_dtype(array.dtype).as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(array, shape=array.shape))
    return node


class Graph:
    """One graph body.

    Attributes:
      nodes: name -> NodeDef. Change inputs only through the methods.
      outputs: label -> reference of a result that must survive; for a FunctionDef the names of its results.
      keep: names of nodes that must survive though nothing consumes them (initialisers, control results).
      arguments: names of the Placeholder nodes that are fed from outside, in order.
      weights: name of a Placeholder node -> its value. Empty in a function body, where constants are Const nodes.
      is_body: whether this is the body of a FunctionDef.
    """

    def __init__(
        self,
        nodes: Iterable[NodeDef],
        outputs: Mapping[str, str],
        *,
        keep: Iterable[str] = (),
        arguments: Iterable[str] = (),
        weights: dict[str, np.ndarray] | None = None,
        is_body: bool = False,
    ):
        self.nodes: dict[str, NodeDef] = {}
        self.outputs = {label: join(*split(ref)) for label, ref in outputs.items()}
        self.keep = list(keep)
        self.arguments = list(arguments)
        self.weights: dict[str, np.ndarray] = {} if weights is None else weights
        self.is_body = is_body
        self._users: dict[str, dict[str, int]] = {}
        self._values: dict[str, np.ndarray | None] = {}
        self._counters: dict[str, int] = {}
        for node in nodes:
            self.add(node)

    # -- reading ------------------------------------------------------------------------------------------------

    def users(self, name: str) -> list[str]:
        """Names of the nodes that take an output of `name`, or a control edge from it; without duplicates."""
        return list(self._users.get(name, ()))

    def uses(self, name: str) -> list[tuple[str, int, int]]:
        """Every input that refers to `name`, as (consumer, input index, output port; -1 for a control edge)."""
        found = []
        for user in self._users.get(name, ()):
            for index, ref in enumerate(self.nodes[user].input):
                producer, port = split(ref)
                if producer == name:
                    found.append((user, index, port))
        return found

    def output_labels(self, name: str) -> list[str]:
        """Labels of the results that node `name` produces."""
        return [label for label, ref in self.outputs.items() if split(ref)[0] == name]

    def producer(self, ref: str) -> NodeDef:
        """The node that a reference refers to."""
        return self.nodes[split(ref)[0]]

    def constant(self, ref: str) -> np.ndarray | None:
        """The value of a reference to a weight or a Const node, seen through Identity; None if it varies."""
        name, port = split(ref)
        while name not in self.weights:
            node = self.nodes.get(name)
            if node is None or port != 0 or any(i.startswith("^") for i in node.input):
                return None
            if node.op == "Identity":
                name, port = split(node.input[0])
                continue
            if node.op != "Const":
                return None
            if name not in self._values:
                self._values[name] = tf.make_ndarray(node.attr["value"].tensor)
            return self._values[name]
        return self.weights[name]

    def data_inputs(self, node: NodeDef) -> list[str]:
        """The data references of a node, without its control edges."""
        return [ref for ref in node.input if not ref.startswith("^")]

    def control_inputs(self, node: NodeDef) -> list[str]:
        """Names of the nodes that must run before `node` by a control edge."""
        return [ref[1:] for ref in node.input if ref.startswith("^")]

    def topological(self) -> list[NodeDef]:
        """The nodes, producers before consumers; back edges of v1 loops (NextIteration -> Merge) are not followed."""
        waiting: dict[str, int] = {}
        ready = []
        for name, node in self.nodes.items():
            producers = {split(ref)[0] for ref in node.input}
            if node.op in ("Merge", "RefMerge"):
                producers = {p for p in producers if self.nodes[p].op not in ("NextIteration", "RefNextIteration")}
            waiting[name] = len(producers)
            if not producers:
                ready.append(name)
        order = []
        while ready:
            name = ready.pop()
            order.append(self.nodes[name])
            back_edge = self.nodes[name].op in ("NextIteration", "RefNextIteration")
            for user in self._users.get(name, ()):
                if back_edge and self.nodes[user].op in ("Merge", "RefMerge"):
                    continue
                waiting[user] -= 1
                if waiting[user] == 0:
                    ready.append(user)
        if len(order) != len(self.nodes):
            stuck = next(name for name, count in waiting.items() if count > 0)
            raise ValueError(f"the graph has a cycle through node {stuck!r}")
        return order

    def reachable(self, roots: Iterable[str]) -> set[str]:
        """Names of the nodes that `roots` depend on, themselves included."""
        seen: set[str] = set()
        stack = list(roots)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            stack.extend(split(ref)[0] for ref in self.nodes[name].input)
        return seen

    def dependents(self, names: Iterable[str]) -> set[str]:
        """Names of the nodes that depend on `names`, also by control edges, themselves included."""
        seen: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack.extend(self.users(name))
        return seen

    def roots(self) -> list[str]:
        """The nodes that must survive: producers of results, and those in `keep`."""
        return [split(ref)[0] for ref in self.outputs.values()] + self.keep

    # -- editing ------------------------------------------------------------------------------------------------

    def unique_name(self, hint: str) -> str:
        """A node name that is not in use, made from `hint`."""
        if hint not in self.nodes:
            return hint
        count = self._counters.get(hint, 1)
        while f"{hint}_{count}" in self.nodes:
            count += 1
        self._counters[hint] = count + 1
        return f"{hint}_{count}"

    def add(self, node: NodeDef) -> str:
        """Adds a node, whose name must be new; returns the name, which is also the reference to its first output."""
        if node.name in self.nodes:
            raise ValueError(f"node {node.name!r} exists already")
        self.nodes[node.name] = node
        for ref in node.input:
            self._link(split(ref)[0], node.name, 1)
        return node.name

    def add_op(self, hint: str, op: str, inputs: Iterable[str], **attrs: object) -> str:
        """Adds a node under a free name made from `hint`; returns the reference to its first output."""
        return self.add(make_node(self.unique_name(hint), op, inputs, **attrs))

    def add_constant(self, hint: str, array: np.ndarray) -> str:
        """Adds a constant: a weight where it is large, a Const node otherwise; returns the reference."""
        name = self.unique_name(hint)
        self.add(make_node(name, "NoOp"))
        self.set_constant(name, array)
        return name

    def set_constant(self, name: str, array: np.ndarray) -> None:
        """Puts a constant in the place of a node: a weight where it is large, a Const node otherwise."""
        array = np.asarray(array)
        if self.is_body or array.size < WEIGHT_ELEMENTS or array.dtype.kind in "OSU":
            self.replace(const_node(name, array))
        else:
            self.replace(make_node(name, "Placeholder", dtype=tf.as_dtype(array.dtype), shape=tuple(array.shape)))
            self.weights[name] = np.ascontiguousarray(array)

    def remove(self, name: str) -> None:
        """Removes a node that nothing consumes any more."""
        if self._users.get(name):
            raise ValueError(f"node {name!r} still feeds {self.users(name)[0]!r}")
        node = self.nodes.pop(name)
        for ref in node.input:
            self._link(split(ref)[0], name, -1)
        self._users.pop(name, None)
        self._values.pop(name, None)
        self.weights.pop(name, None)

    def replace(self, node: NodeDef) -> None:
        """Puts `node` in the place of the node of the same name; consumers keep their references."""
        for ref in self.nodes[node.name].input:
            self._link(split(ref)[0], node.name, -1)
        self.nodes[node.name] = node
        self._values.pop(node.name, None)
        self.weights.pop(node.name, None)
        for ref in node.input:
            self._link(split(ref)[0], node.name, 1)

    def set_inputs(self, name: str, inputs: Iterable[str]) -> None:
        """Replaces all inputs of a node, control edges (which must come last) included."""
        node = self.nodes[name]
        refs = list(inputs)
        for ref in node.input:
            self._link(split(ref)[0], name, -1)
        del node.input[:]
        node.input.extend(refs)
        for ref in refs:
            self._link(split(ref)[0], name, 1)

    def set_input(self, name: str, index: int, ref: str) -> None:
        """Replaces one input of a node."""
        node = self.nodes[name]
        self._link(split(node.input[index])[0], name, -1)
        node.input[index] = ref
        self._link(split(ref)[0], name, 1)

    def redirect(self, old: str, new: str) -> None:
        """Makes every consumer, and every result, that refers to `old` refer to `new`; control edges stay."""
        name, port = split(old)
        for user, index, used in self.uses(name):
            if used == port:
                self.set_input(user, index, new)
        old = join(name, port)
        for label, ref in self.outputs.items():
            if ref == old:
                self.outputs[label] = new

    def redirect_control(self, name: str, producers: Iterable[str]) -> None:
        """Replaces every control edge from `name` by control edges from `producers`."""
        producers = list(producers)
        for user in dict.fromkeys(user for user, _, port in self.uses(name) if port == -1):
            node = self.nodes[user]
            refs = [ref for ref in node.input if ref != f"^{name}"]
            data = {split(ref)[0] for ref in refs}
            refs += [f"^{p}" for p in dict.fromkeys(producers) if p not in data and p != user]
            self.set_inputs(user, refs)

    def sweep(self) -> int:
        """Removes the nodes that no result and no kept node depends on; arguments stay. Returns how many went."""
        live = self.reachable(self.roots())
        live.update(name for name in self.arguments if name in self.nodes)
        dead = [name for name in self.nodes if name not in live]
        for name in dead:
            self._users.pop(name, None)
        for name in dead:
            node = self.nodes.pop(name)
            self._values.pop(name, None)
            self.weights.pop(name, None)
            for ref in node.input:
                producer = split(ref)[0]
                if producer in self._users:
                    self._link(producer, name, -1)
        return len(dead)

    def _link(self, producer: str, user: str, change: int) -> None:
        users = self._users.setdefault(producer, {})
        count = users.get(user, 0) + change
        if count:
            users[user] = count
        else:
            users.pop(user, None)

    def same_as(self, other: Graph) -> bool:
        """Whether both hold the same nodes, inputs, results and weights (the same arrays, not equal ones)."""
        return (
            self.outputs == other.outputs
            and self.nodes == other.nodes
            and self.weights.keys() == other.weights.keys()
            and all(value is other.weights[name] for name, value in self.weights.items())
        )

    # -- the two forms on disk --------------------------------------------------------------------------------------

    def copy(self) -> Graph:
        """A copy that can be edited without touching this one; the arrays of the weights are shared."""
        nodes = []
        for node in self.nodes.values():
            clone = NodeDef()
            clone.CopyFrom(node)
            nodes.append(clone)
        return Graph(
            nodes,
            self.outputs,
            keep=self.keep,
            arguments=self.arguments,
            weights=dict(self.weights),
            is_body=self.is_body,
        )

    def to_graph_def(self, library: Iterable[FunctionDef] = ()) -> GraphDef:
        """The body as a GraphDef, weights and arguments as Placeholders, with a function library."""
        graph_def = GraphDef()
        graph_def.versions.producer = tf.version.GRAPH_DEF_VERSION
        graph_def.node.extend(self.nodes.values())
        graph_def.library.function.extend(library)
        return graph_def


def function_body(function: FunctionDef, library: Mapping[str, FunctionDef]) -> Graph:
    """Reads a FunctionDef into the common form.

    Args:
      function: the FunctionDef.
      library: the functions by name, to resolve nodes that call one of them directly.

    Raises:
      ValueError: a signature that the common form cannot hold (an argument that is a list of tensors).
    """
    nodes = []
    flat: dict[str, str] = {}
    arguments = []
    for index, arg in enumerate(function.signature.input_arg):
        if arg.number_attr or arg.type_list_attr or arg.type_attr:
            raise ValueError(f"function {function.signature.name!r}: argument {arg.name!r} is a list or polymorphic")
        node = make_node(arg.name, "Placeholder", dtype=tf.as_dtype(arg.type))
        shapes = function.arg_attr[index].attr["_output_shapes"].list.shape if index in function.arg_attr else []
        if shapes:
            node.attr["shape"].shape.CopyFrom(shapes[0])
        nodes.append(node)
        arguments.append(arg.name)
        flat[arg.name] = arg.name
    for source in function.node_def:
        for label, start, count in output_ranges(source, library):
            for i in range(count):
                flat[f"{source.name}:{label}:{i}"] = join(source.name, start + i)
            flat[f"{source.name}:{label}"] = join(source.name, start)
    for source in function.node_def:
        node = NodeDef()
        node.CopyFrom(source)
        inputs = [ref if ref.startswith("^") else flat[ref] for ref in source.input]
        del node.input[:]
        node.input.extend(inputs)
        nodes.append(node)
    outputs = {arg.name: flat[function.ret[arg.name]] for arg in function.signature.output_arg}
    keep = list(function.control_ret.values())
    return Graph(nodes, outputs, keep=keep, arguments=arguments, is_body=True)


def function_def(graph: Graph, original: FunctionDef, name: str, library: Mapping[str, FunctionDef]) -> FunctionDef:
    """Writes a body back as a FunctionDef called `name`, with the signature of `original`."""
    function = FunctionDef()
    function.signature.CopyFrom(original.signature)
    function.signature.name = name
    for key, attr in original.attr.items():
        function.attr[key].CopyFrom(attr)
    for index, arg_attr in original.arg_attr.items():
        function.arg_attr[index].CopyFrom(arg_attr)
    arguments = set(graph.arguments)
    labels: dict[str, str] = {arg: arg for arg in graph.arguments}
    for node in graph.nodes.values():
        if node.name not in arguments:
            for label, start, count in output_ranges(node, library):
                for i in range(count):
                    labels[join(node.name, start + i)] = f"{node.name}:{label}:{i}"
    for node in graph.topological():
        if node.name in arguments:
            continue
        clone = function.node_def.add()
        clone.CopyFrom(node)
        del clone.input[:]
        for ref in node.input:
            control = ref.startswith("^")
            if not (control and ref[1:] in arguments):
                clone.input.append(ref if control else labels[ref])
    for label, ref in graph.outputs.items():
        function.ret[label] = labels[ref]
    for label, kept in original.control_ret.items():
        if kept in graph.keep:
            function.control_ret[label] = kept
    del function.signature.control_output[:]
    function.signature.control_output.extend(c for c in original.signature.control_output if c in function.control_ret)
    return function


def output_ranges(node: NodeDef, library: Mapping[str, FunctionDef]) -> Iterator[tuple[str, int, int]]:
    """Yields (output name, first port, number of ports) for each named output of a node."""
    called = library.get(node.op)
    definition = called.signature if called is not None else op_def(node.op)
    if definition is None:
        raise ValueError(f"node {node.name!r}: op {node.op!r} is not registered")
    start = 0
    for arg in definition.output_arg:
        count = 1
        if arg.number_attr:
            count = node.attr[arg.number_attr].i
        elif arg.type_list_attr:
            count = len(node.attr[arg.type_list_attr].list.type)
        yield arg.name, start, count
        start += count


@functools.lru_cache(maxsize=4096)
def _holds_functions(op: str) -> bool:
    definition = op_def(op)
    return definition is None or any(attr.type in ("func", "list(func)") for attr in definition.attr)


def called_functions(node: NodeDef) -> list[str]:
    """Names of the functions that a node refers to by its attributes (branches, bodies, calls)."""
    names: list[str] = []
    if not _holds_functions(node.op):
        return names
    for _, attr in sorted(node.attr.items()):  # a proto's own order changes from process to process
        if attr.HasField("func"):
            names.append(attr.func.name)
        elif attr.HasField("list"):
            names.extend(f.name for f in attr.list.func)
    return names


Shape = tuple[int | None, ...] | None


def infer_tensors(graph: Graph, library: Iterable[FunctionDef] = ()) -> dict[str, tuple[tf.DType, Shape]]:
    """Type and static shape of every output by TensorFlow's own shape functions.

    Returns:
      Reference -> type, and shape, with None for an unknown dimension, or None as a whole for an unknown rank.
    """
    with tf.Graph().as_default() as imported:
        tf.graph_util.import_graph_def(graph.to_graph_def(library), name="")
    return {
        join(operation.name, port): (t.dtype, None if t.shape.rank is None else tuple(t.shape.as_list()))
        for operation in imported.get_operations()
        for port, t in enumerate(operation.outputs)
    }


def infer_shapes(graph: Graph, library: Iterable[FunctionDef] = ()) -> dict[str, Shape]:
    """Static shapes of every output, see `infer_tensors`."""
    return {ref: shape for ref, (_, shape) in infer_tensors(graph, library).items()}
