"""The rank-constrained topology of a dense layer: its weights as sums of outer products, in two stages.

    x folded into X (T, F)        y[o] = sum_tf W_o[t, f] X[t, f]

    of nodes    W_o ~ sum_k u_ok v_ok'    y[o] = sum_k u_ok' (X v_ok)    each node has k filters of its own
    shared      W_o ~ U_o V'              y[o] = <U_o, X V>              all nodes have the k filters of V
                                                                         (Nakkiran et al. 2015: the first)

The first comes from the singular value decomposition of each A W_o B, the second from that of all of them side by side:
A^2 = E[X X'] and B^2 = E[X' X] of the owner's rows, or I. What is least is so the mean square error of y (to the extent
that the second moments of X are a Kronecker product), and not that of weights whose inputs are always 0.
"""

from __future__ import annotations

import abc

import numpy as np
import tensorflow as tf

from tfopt.graph import Graph

# Of the mean of the second moments: what is added to all of them, so that A and B have inverses.
_RIDGE = 1e-3


class Scale:
    """A (T, T) and B (F, F), and their inverses.

    Attributes:
      frames, width: the second moments E[X X'] and E[X' X], up to a factor.
    """

    def __init__(self, frames: np.ndarray, width: np.ndarray):
        self._a, self._a_inverse = _roots(frames)
        self._b, self._b_inverse = _roots(width)

    @classmethod
    def plain(cls, frames: int, width: int) -> Scale:
        """That of inputs of which nothing is known."""
        return cls(np.eye(frames), np.eye(width))

    def apply(self, kernel: np.ndarray) -> np.ndarray:
        """A W_o B for each node: (T, F, nodes) float64."""
        return np.einsum("st,tfn,fg->sgn", self._a, kernel, self._b, optimize=True)

    def undo(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A^-1 u (T, ..) and B^-1 v (F, ..)."""
        return np.tensordot(self._a_inverse, u, 1), np.tensordot(self._b_inverse, v, 1)

    def lost(self, kernel: np.ndarray, approximate: np.ndarray) -> float:
        """The share of the mean square of y that another W misses."""
        total = float(np.square(self.apply(kernel)).sum())
        return float(np.square(self.apply(kernel.astype(np.float64) - approximate)).sum()) / total if total else 0.0


def _roots(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root of a matrix of second moments, and its inverse."""
    values, vectors = np.linalg.eigh(moments / (np.trace(moments) / len(moments) or 1.0))
    roots = np.sqrt(np.maximum(values, 0) + _RIDGE)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


class Topology(abc.ABC):
    """Two stages in the place of W (T, F, nodes).

    Attributes:
      u, v: what is stored.
      kernel: W as the stages make it: (T, F, nodes).
      work: multiplications a row.
    """

    u: np.ndarray
    v: np.ndarray
    kernel: np.ndarray
    work: int

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return self.u.nbytes + self.v.nbytes

    @abc.abstractmethod
    def write(self, graph: Graph, name: str, x: str) -> str:
        """Writes both stages.

        Args:
          graph: edited in place.
          name: how the names of the nodes begin.
          x: the reference to X, of any shape of (rows, T F) elements.

        Returns:
          The reference to y: (rows, nodes).
        """


class OfNodes(Topology):
    """u (k, T, nodes) and v (k, F, nodes)."""

    def __init__(self, kernel: np.ndarray, rank: int, scale: Scale):
        left, values, right = np.linalg.svd(scale.apply(kernel).transpose(2, 0, 1), full_matrices=False)
        u, v = scale.undo(
            left[:, :, :rank].transpose(1, 2, 0), (right[:, :rank] * values[:, :rank, None]).transpose(2, 1, 0)
        )
        # u (T, k, nodes) and v (F, k, nodes): of the same norm, they learn alike.
        norms = np.sqrt(np.linalg.norm(v, axis=0) / np.maximum(np.linalg.norm(u, axis=0), 1e-30))
        self.u = np.ascontiguousarray((u * norms).transpose(1, 0, 2), np.float32)
        self.v = np.ascontiguousarray((v / np.where(norms > 0, norms, 1)).transpose(1, 0, 2), np.float32)
        self.kernel = np.einsum("ktn,kfn->tfn", self.u, self.v)
        self.work = self.u.shape[0] * (kernel.size + kernel.shape[0] * kernel.shape[2])

    def write(self, graph: Graph, name: str, x: str) -> str:
        """See `Topology.write`: a dense layer over each frame, then a depthwise convolution over all frames."""
        rank, frames, nodes = self.u.shape
        width = self.v.shape[1]
        filters = self.v.transpose(1, 0, 2).reshape(width, rank * nodes)
        over_time = self.u.transpose(1, 0, 2).reshape(frames, 1, rank * nodes, 1)
        features = product(graph, f"{name}/filtered", reshape(graph, f"{name}/frames", x, [-1, width]), filters)
        result = graph.add_op(
            f"{name}/over_time",
            "DepthwiseConv2dNative",
            [
                reshape(graph, f"{name}/features", features, [-1, frames, 1, rank * nodes]),
                graph.add_constant(f"{name}/over_time/kernel", over_time),
            ],
            T=tf.float32,
            strides=[1, 1, 1, 1],
            dilations=[1, 1, 1, 1],
            padding="VALID",
            data_format="NHWC",
        )
        if rank == 1:
            return reshape(graph, f"{name}/nodes", result, [-1, nodes])
        axis = graph.add_constant(f"{name}/axis", np.array(1, np.int32))
        ranks = reshape(graph, f"{name}/ranks", result, [-1, rank, nodes])
        return graph.add_op(f"{name}/nodes", "Sum", [ranks, axis], T=tf.float32, Tidx=tf.int32, keep_dims=False)


class Shared(Topology):
    """u (T, k, nodes) and v (F, k)."""

    def __init__(self, kernel: np.ndarray, rank: int, scale: Scale):
        frames, width, nodes = kernel.shape
        flat = scale.apply(kernel).transpose(1, 0, 2).reshape(width, -1)
        left, values, right = np.linalg.svd(flat, full_matrices=False)
        right = (values[:rank, None] * right[:rank]).reshape(-1, frames, nodes).transpose(1, 0, 2)
        u, v = scale.undo(right, left[:, :rank])
        norms = np.linalg.norm(v, axis=0)
        self.u = np.ascontiguousarray(u * norms[:, None], np.float32)
        self.v = np.ascontiguousarray(v / norms, np.float32)
        self.kernel = np.einsum("tkn,fk->tfn", self.u, self.v)
        self.work = frames * self.v.size + self.u.size

    def write(self, graph: Graph, name: str, x: str) -> str:
        """See `Topology.write`: a dense layer over each frame, then one over all that it gives."""
        frames, rank, nodes = self.u.shape
        each = reshape(graph, f"{name}/frames", x, [-1, len(self.v)])
        flat = reshape(graph, f"{name}/features", product(graph, f"{name}/filtered", each, self.v), [-1, frames * rank])
        return product(graph, f"{name}/nodes", flat, self.u.reshape(frames * rank, nodes))


TOPOLOGIES: dict[str, type[OfNodes] | type[Shared]] = {"node": OfNodes, "shared": Shared}


def reshape(graph: Graph, hint: str, x: str, shape: list[int]) -> str:
    """A tensor in another shape."""
    sizes = graph.add_constant(f"{hint}/shape", np.array(shape, np.int32))
    return graph.add_op(hint, "Reshape", [x, sizes], T=tf.float32, Tshape=tf.int32)


def product(graph: Graph, hint: str, x: str, kernel: np.ndarray) -> str:
    """A tensor (rows, inputs) times a new weight (inputs, nodes)."""
    weight = graph.add_constant(f"{hint}/kernel", kernel)
    return graph.add_op(hint, "MatMul", [x, weight], T=tf.float32, transpose_a=False, transpose_b=False)
