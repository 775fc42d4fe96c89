"""All or nothing: results are written beside their final place and renamed there when everything is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tfopt.errors import TfoptError


class Workspace:
    """A hidden directory beside the output directory; a context manager that removes it, whatever happened.

    A killed run leaves at most the hidden directory, which no file watcher takes for a model, and which the next run
    with the same output directory removes.
    """

    def __init__(self, output: Path, targets: Sequence[str], *, overwrite: bool):
        """Checks that results can be written.

        Args:
          output: the final directory; made if it is missing.
          targets: paths below it that this run writes.
          overwrite: whether existing ones are replaced.

        Raises:
          TfoptError: a target exists and may not be replaced, or the place cannot be written.
        """
        self._output = output
        self._targets = list(targets)
        if output.exists() and not output.is_dir():
            raise TfoptError(f"--output_dir={output}: is a file; name a directory")
        existing = [t for t in targets if (output / t).exists()]
        if existing and not overwrite:
            raise TfoptError(f"--output_dir={output}: holds {existing[0]} already; pass --overwrite to replace it")
        parent = next((p for p in (output.parent, *output.parent.parents) if p.exists()), Path())
        try:
            self._made = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self._root = Path(tempfile.mkdtemp(prefix=self._prefix(os.getpid()), dir=output.parent))
            if output.exists() and not os.access(output, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise TfoptError(f"--output_dir={output}: cannot be written in {parent}: {error.strerror}") from error
        self.scratch = self._root / "scratch"
        self.scratch.mkdir()
        (self._root / "out").mkdir()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        for directory in self._made:  # what was made for nothing goes again; rmdir refuses what is in use
            try:
                directory.rmdir()
            except OSError:
                break

    def path(self, target: str) -> Path:
        """Where to write what will end at `target` below the output directory; its parent exists."""
        path = self._root / "out" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def final(self, path: str | Path) -> Path:
        """Where a path inside the workspace will be in the end."""
        return self._output / Path(path).relative_to(self._root / "out")

    def write(self, target: str, text: str) -> None:
        """Writes a text file."""
        self.path(target).write_text(text, encoding="utf-8")

    def discard(self, path: str | Path) -> None:
        """Removes a rejected artifact, if it was written at all."""
        if not path:
            return
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def publish(self) -> None:
        """Moves every target to its place by one rename each; the model that a server watches comes last."""
        self._output.mkdir(exist_ok=True)
        old = self._root / "old"
        for target in sorted(self._targets, key=lambda t: t.startswith("serving/")):
            source, place = self._root / "out" / target, self._output / target
            if place.exists():
                (old / target).parent.mkdir(parents=True, exist_ok=True)
                place.rename(old / target)
            if source.is_dir() and not any(source.iterdir()):
                continue
            if source.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                source.rename(place)

    def _prefix(self, pid: int) -> str:
        return f".{self._output.name}.tfopt-{pid}-"

    def _remove_stale(self) -> None:
        """Removes what killed runs left: workspaces whose process is gone."""
        for path in self._output.parent.glob(f".{self._output.name}.tfopt-*"):
            pid = path.name.rsplit("tfopt-", 1)[1].split("-")[0]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
