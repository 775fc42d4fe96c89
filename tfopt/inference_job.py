"""What batch inference asks of an artifact: which signature, on which rows, written how. On Beam it goes to workers."""

from __future__ import annotations

from dataclasses import dataclass

from tfopt import batches, runtime
from tfopt.data import Dataset, batch_size
from tfopt.errors import TfoptError
from tfopt.prediction_records import Encoder


@dataclass(frozen=True)
class Job:
    """What to run, and how to write it; picklable.

    Attributes:
      model: the artifact.
      batches: the rows.
      encoder: makes records.
      threads: of the runtime.
    """

    model: str
    batches: batches.Batches
    encoder: Encoder
    threads: int

    def records(self, program: runtime.Program, batch: Dataset) -> list[bytes]:
        """Runs a batch; returns a record for each row."""
        return self.encoder.records(batch, call(program, self.encoder.signature, batch))


def call(program: runtime.Program, signature: str, batch: Dataset) -> runtime.Outputs:
    """Runs a signature on a batch, also one that is smaller than the signature's fixed batch.

    Args:
      program: an opened artifact.
      signature: its name.
      batch: rows as the signature takes them.

    Returns:
      The outputs, without what was filled up. An output that has no row for each row of input is given as it is.
    """
    rows = len(batch)
    wanted = max(rows, batch_size(program.signatures[signature].inputs, rows))
    return batches.without_filling(program.run(signature, batches.filled(batch, wanted)), rows, wanted)


def check_signature(program: runtime.Program, signature: str | None) -> str:
    """The signature that is meant: serving_default, or the only one, where none is named."""
    have = list(program.signatures)
    if signature is None:
        if "serving_default" in have or len(have) == 1:
            return "serving_default" if "serving_default" in have else have[0]
        raise TfoptError(f"{program.path}: --signature: name one of {', '.join(have)}")
    if signature not in have:
        raise TfoptError(f"{program.path} has no signature '{signature}'; it has: {', '.join(have)}")
    return signature
