"""The state of a training in one file, replaced as a whole: a killed run finds the last complete one."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import TfoptError, one_line

_FILE = "training.npz"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state.

    Attributes:
      directory: made where it is not there.
      run: what the training is (settings, names, data); the state of another one is refused.
    """

    directory: Path
    run: str

    def save(self, progress: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """Replaces the state: numbers as JSON, and arrays."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"{_FILE}.partial"
        text = json.dumps({"run": self.run, "progress": progress})
        with partial.open("wb") as file:
            np.savez(file, np.array(text), *arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.directory / _FILE)

    def restore(self) -> tuple[dict[str, Any], list[np.ndarray]] | None:
        """The state as it was saved, or None where there is none.

        Raises:
          TfoptError: it cannot be read, or is of another training.
        """
        path = self.directory / _FILE
        if not path.exists():
            return None
        try:
            with np.load(path) as saved:
                state = json.loads(str(saved["arr_0"]))
                arrays = [saved[f"arr_{index}"] for index in range(1, len(saved.files))]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise TfoptError(f"{path}: cannot be read as the state of a training: {one_line(error)}") from error
        if state["run"] != self.run:
            raise TfoptError(
                f"{path}: is the state of another training (other settings, data or model); remove it to start anew"
            )
        return state["progress"], arrays
