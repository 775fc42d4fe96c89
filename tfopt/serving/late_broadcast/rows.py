"""The number of rows of a request, in the graph: read from an input, made once where somebody needs it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfopt.graph import Graph


class Rows:
    """N, and the shapes made of it."""

    def __init__(self, graph: Graph, source: str, dtype: tf.DType):
        """Takes N from the first dimension of an input.

        Args:
          graph: gets the nodes.
          source: the Placeholder.
          dtype: of it.
        """
        self.graph, self._source, self._dtype = graph, source, dtype
        self._multiples: dict[int, str] = {}

    def rows(self) -> str:
        """[N]"""
        if 1 not in self._multiples:
            graph, source = self.graph, self._source
            shape = graph.add_op("rows/shape", "Shape", [source], T=self._dtype, out_type=tf.int32)
            bounds = [
                graph.add_constant(f"rows/{end}", np.array([i], np.int32)) for i, end in enumerate(("from", "to"))
            ]
            strides = graph.add_constant("rows/strides", np.array([1], np.int32))
            self._multiples[1] = graph.add_op(
                "rows", "StridedSlice", [shape, *bounds, strides], T=tf.int32, Index=tf.int32
            )
        return self._multiples[1]

    def multiples(self, rank: int) -> str:
        """[N, 1, .., 1]"""
        if rank not in self._multiples:
            ones = self.graph.add_constant(f"rows/ones_{rank}", np.ones(rank - 1, np.int32))
            self._multiples[rank] = self.concat(f"rows/of_rank_{rank}", [self.rows(), ones])
        return self._multiples[rank]

    def concat(self, name: str, refs: list[str]) -> str:
        """Joins vectors of dimensions."""
        if len(refs) == 1:
            return refs[0]
        axis = self.graph.add_constant(f"{name}/axis", np.array(0, np.int32))
        return self.graph.add_op(f"{name}/dims", "ConcatV2", [*refs, axis], T=tf.int32, Tidx=tf.int32, N=len(refs))
