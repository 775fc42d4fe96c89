"""What a tensor can hold where a dense column of one value a row becomes a SparseTensor, and is looked up.

A column has N rows and is named by the tensor that has them; k of them are those where a mask holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tfopt.lookups.row_values import Expr


@dataclasses.dataclass(frozen=True)
class Extent:
    """How many rows of a column (named by the tensor that has them) a mask holds for: an entry of a shape."""

    column: str
    mask: Expr

    def __mul__(self, other: object) -> Extent:
        if other == 1:
            return self
        raise TypeError("only 1 times a number of rows is a number of rows")

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Vector:
    """A small integer tensor, a scalar as a list of one; None for an entry that is not known."""

    entries: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """One value for each row of a column where the mask holds: (k,), or (k, 1) where `tall`.

    `derived` says that it came from a SparseTensor.
    """

    column: str
    mask: Expr
    value: Expr
    tall: bool
    derived: bool = False


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The numbers of the rows where the mask holds: (k,), (k, 1), or (k, 2) with a second column of zeros."""

    column: str
    mask: Expr
    form: str  # flat, tall, pairs, or packed for the transposed pairs


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where, among the rows of the mask, `inner` holds too: (k,), or (k, 1) where `tall`."""

    column: str
    mask: Expr
    inner: Expr
    tall: bool


@dataclasses.dataclass(frozen=True)
class Distinct:
    """What Unique makes of one value a row: the distinct values, or (`inverse`) which of them each row has.

    With a table: the rows of the table that the distinct values name.
    """

    rows: Rows
    inverse: bool = False
    table: str = ""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """(N, D): row ids[r] of a table (V, D), or zeros where `zero` holds.

    With `hot`, the name of a OneHot node: its row for ids[r] instead.
    """

    column: str
    table: str
    ids: Expr
    zero: Expr
    hot: str = ""


@dataclasses.dataclass(frozen=True)
class Wide:
    """(N, D): the one value of each row, D times."""

    column: str
    value: Expr


@dataclasses.dataclass(frozen=True)
class Hot:
    """(N, 1, D): the OneHot node of this name, of these ids."""

    rows: Rows
    node: str
