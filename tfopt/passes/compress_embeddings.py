"""compress_embeddings: stores large tables of embeddings in fewer bytes, and trains the model to answer as before.

    E[i] ~ Q[i // m] R[i mod m]      quotient_remainder      (Shi et al. 2020)
    E[i] ~ sum_j H_j[h_j(i)]         hashing                 (Weinberger et al. 2009, Svenstrup et al. 2017)
    E[i] ~ F[i], or N[i] P           mixed_dimension         (Ginart et al. 2021)
    E[i] ~ V[p(i)]                   vocabulary              rare ids share a row

Each starts from the trained table: what it loses of it is least in the squares, each row weighted by how often the rows
of the owner read it. Ids that are out of range fail as before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfopt import recovery
from tfopt.embeddings import hashing as embeddings_hashing
from tfopt.embeddings import mixed_dimension as embeddings_mixed
from tfopt.embeddings import quotient_remainder as embeddings_quotient
from tfopt.embeddings import vocabulary as embeddings_vocabulary
from tfopt.embeddings.tables import Form, Table, count, find, is_lookup, lost, replace
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.rewrite import Log, Refused

_METHODS = ("quotient_remainder", "hashing", "mixed_dimension", "vocabulary")
# Of forms whose bytes are within this factor of the smallest, the one that loses least is taken.
_ALIKE = 1.1


def run(
    model: Model,
    log: Log,
    data: Data,
    method: str = "auto",
    ratio: float = 4.0,
    max_error: float = 0.1,
    min_count: int = 0,
    hashes: int = 2,
    min_bytes: int = 16384,
    **training: Any,
) -> None:
    """Compresses tables that are only looked up, in place.

    Args:
      model: the model.
      log: gets what became of each table, and how the loss fell.
      data: with representative rows, labelled rows, or both; without, every row counts alike, and nothing is trained.
      method: of METHODS above; "auto" takes the smallest that loses at most `max_error`.
      ratio: bytes before / bytes after, at least.
      max_error: for "auto", the share of the squares of a table that may be lost before the training.
      min_count: for "vocabulary", rows that are read less often go, whatever the ratio; 0 keeps what the ratio allows.
      hashes: for "hashing", how many hash functions.
      min_bytes: smaller tables stay as they are.
      **training: options of `recovery.OPTIONS`.

    Raises:
      TfoptError: an option out of its range, or no table that can be compressed.
    """
    if method != "auto" and method not in _METHODS:
        raise TfoptError(f"compress_embeddings: method={method!r}: choose from auto, {', '.join(_METHODS)}")
    if ratio <= 1:
        raise TfoptError(f"compress_embeddings: ratio={ratio}: must be above 1")
    for option, value, bound in (("hashes", hashes, 1), ("min_count", min_count, 0), ("max_error", max_error, 0)):
        if value < bound:
            raise TfoptError(f"compress_embeddings: {option}={value}: must be at least {bound}")
    before = model.weight_bytes
    for name in sorted(model.weights):
        if name not in model.weights or not is_lookup(model.graph, name):
            continue
        array = model.weights[name]
        try:
            if array.nbytes < min_bytes:
                raise Refused(f"it has {array.nbytes:,} bytes, less than min_bytes={min_bytes:,}")
            table = find(model.graph, name)
            counts = _counts(model, data, table)
            weights = np.ones(len(array)) if counts is None else counts + 1.0
            form, note = _choose(array, weights, counts, method, ratio, max_error, min_count, hashes, data.seed)
            replace(model, table, form)
        except Refused as reason:
            log.refused["compressed embedding", name] = str(reason)
            continue
        if counts is None:
            note += "; every row counted alike, as how often each is read is not known"
        log.notes.append(f"{name}: {note}")
        log.applied[f"table of embeddings by {form.method}"] += 1
    if not log.applied:
        reasons = "; ".join(f"{name}: {reason}" for (_, name), reason in log.refused.items())
        raise TfoptError(f"compress_embeddings: no table of embeddings was compressed: {reasons or 'there is none'}")
    recovery.recover(model, log, data, "compress_embeddings", **training)
    log.notes.append(f"{before:,} bytes of weights became {model.weight_bytes:,}")


def _counts(model: Model, data: Data, table: Table) -> np.ndarray | None:
    """How often the owner's rows read each row of a table; None where that cannot be known."""
    found = [count(model, data.signature, table, rows) for rows in (data.rows, data.labelled) if rows is not None]
    known = [counts for counts in found if counts is not None]
    return np.sum(known, axis=0) if known else None


def _choose(
    array: np.ndarray,
    weights: np.ndarray,
    counts: np.ndarray | None,
    method: str,
    ratio: float,
    max_error: float,
    min_count: int,
    hashes: int,
    seed: int,
) -> tuple[Form, str]:
    """The form that a table gets, and what there is to say about it.

    Raises:
      Refused: no method can, or none is good enough.
    """
    budget = int(array.nbytes / ratio)
    makers = {
        "quotient_remainder": lambda: embeddings_quotient.fit(array, weights, budget, seed),
        "hashing": lambda: embeddings_hashing.fit(array, weights, budget, hashes, seed),
        "mixed_dimension": lambda: embeddings_mixed.fit(array, weights, budget),
        "vocabulary": lambda: embeddings_vocabulary.fit(array, weights, counts, budget, min_count),
    }
    tried: list[tuple[Form, float]] = []
    reasons = []
    for name in _METHODS if method == "auto" else (method,):
        try:
            form = makers[name]()
            if form.nbytes >= array.nbytes:
                raise Refused(f"it would take {form.nbytes:,} bytes, and takes {array.nbytes:,}")
            if method == "auto" and form.nbytes > budget:
                raise Refused(f"it would take {form.nbytes:,} bytes; ratio={ratio:g} wants {budget:,}")
        except Refused as reason:
            reasons.append(f"{name}: {reason}" if method == "auto" else str(reason))
            continue
        tried.append((form, lost(array, form.rows(), weights)))
    good = [(form, error) for form, error in tried if method != "auto" or error <= max_error]
    if not good:
        reasons += [f"{form.method} would lose {error:.1%} of its squares" for form, error in tried]
        bound = f"; max_error={max_error:g} is the bound: name a method, or ask for a lower ratio" if tried else ""
        raise Refused("; ".join(reasons) + bound)
    smallest = min(form.nbytes for form, _ in good)
    form, error = min((pair for pair in good if pair[0].nbytes <= _ALIKE * smallest), key=lambda pair: pair[1])
    others = ", ".join(f"{other.method} {share:.1%}" for other, share in tried if other is not form)
    note = (
        f"{form.method}, {form.detail}: {array.nbytes:,} bytes became {form.nbytes:,}, and {error:.1%} of its squares "
        f"were lost before the training{f' ({others})' if others else ''}"
    )
    return form, note


PASS = Pass(
    "compress_embeddings",
    run,
    options={
        "method": "auto",
        "ratio": 4.0,
        "max_error": 0.1,
        "min_count": 0,
        "hashes": 2,
        "min_bytes": 16384,
        **recovery.OPTIONS,
    },
    needs=("fold_affine",),
    lossless=False,
    learns=True,
)
