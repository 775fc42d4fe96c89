"""All or nothing: results are written beside their final place and renamed there when everything is complete."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tfopt.errors import TfoptError


def remove_stale(output: Path) -> None:
    """Removes what killed runs left for an output directory: hidden workspaces whose process is gone."""
    for path in _nearest(output.parent).glob(f"{_prefix(output)}*"):
        pid = path.name.removeprefix(_prefix(output)).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


_AT_FDCWD, _EXCHANGE = -100, 2  # <fcntl.h>, RENAME_EXCHANGE of <linux/fs.h>


class Workspace:
    """A hidden directory beside the output directory; a context manager that removes it, whatever happened.

    Where the parents of the output directory do not exist yet, it lies beside the first that is missing, so that no
    run makes a directory before it has something to put there. A killed run leaves at most the hidden directory, which
    no file watcher takes for a model, and which the next run with the same output directory removes.
    """

    def __init__(self, output: Path, targets: Sequence[str], *, overwrite: bool, flag: str = "--output_dir"):
        """Checks that results can be written.

        Args:
          output: the final directory; made if it is missing.
          targets: paths below it that this run writes.
          overwrite: whether existing ones are replaced.
          flag: the user's name for `output`.

        Raises:
          TfoptError: a target exists and may not be replaced, or the place cannot be written.
        """
        self._output = output
        self._targets = list(targets)
        try:
            anchor = _nearest(output.parent)
            if output.exists() and not output.is_dir():
                raise TfoptError(f"{flag}={output}: is a file; name a directory")
            existing = [t for t in targets if (output / t).exists()]
            if existing and not overwrite:
                raise TfoptError(f"{flag}={output}: holds {existing[0]} already; pass --overwrite to replace it")
            if output.exists() and not os.access(output, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            remove_stale(output)
            self._root = Path(tempfile.mkdtemp(prefix=f"{_prefix(output)}{os.getpid()}-", dir=anchor))
            self.scratch = self._root / "scratch"
            self.scratch.mkdir()
            (self._root / "out").mkdir()
        except OSError as error:
            raise TfoptError(f"{flag}={output}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

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
        """Removes a rejected artifact, if it was written at all; what is not in the workspace is not removed."""
        if not path or not Path(path).is_relative_to(self._root):
            return
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def publish(self) -> None:
        """Moves every target to its place by one rename each; the model that a server watches comes last."""
        self._output.mkdir(parents=True, exist_ok=True)
        for target in sorted(self._targets, key=lambda t: t.startswith("serving/")):
            source, place = self._root / "out" / target, self._output / target
            made = source.exists() and not (source.is_dir() and not any(source.iterdir()))
            if made and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                source.rename(place)
            elif made:
                _exchange(source, place)
            elif place.exists():  # an earlier run made what this one did not
                source.parent.mkdir(parents=True, exist_ok=True)
                place.rename(source.with_name(f"{source.name}.old"))


def _exchange(new: Path, place: Path) -> None:
    """Puts `new` at `place`, and what was there where `new` was; on Linux in one step, so that no kill loses both."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is not None and rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(place), _EXCHANGE) == 0:
            return
    aside = new.with_name(f"{new.name}.old")
    place.rename(aside)
    new.rename(place)


def _nearest(directory: Path) -> Path:
    """The first of a directory and its parents that exists."""
    return next((p for p in (directory, *directory.parents) if p.exists()), Path())


def _prefix(output: Path) -> str:
    """How the names of the hidden workspaces of an output directory begin; the process id follows."""
    return f".{output.name}.tfopt-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
