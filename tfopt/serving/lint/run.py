"""Will this model load, batch, warm up, and run as TFLite or by XLA on stock TensorFlow Serving with these flags?

A rule is a function that looks at a `Subject` and yields `Finding`s; the rules of a topic are a tuple in its file. The
graph is read as it was saved; what only a run can show is seen in a v1 session in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from tfopt.errors import TfoptError, printable
from tfopt.model import read_meta_graph
from tfopt.serving.lint import batching, files, ops, signatures, tflite, warmup
from tfopt.serving.lint.subject import ERROR, SEVERITIES, Finding, Flags, Subject

RULES = (
    *files.RULES,
    *signatures.RULES,
    *ops.RULES,
    *batching.RULES,
    *warmup.RULES,
    *tflite.RULES,
)


@dataclasses.dataclass(frozen=True)
class Lint:
    """The findings of a model, the worst first.

    Attributes:
      path: the version directory.
      flags: what it was looked at with.
      findings: what was found.
    """

    path: str
    flags: Flags
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether there is an error among them."""
        return any(finding.severity == ERROR for finding in self.findings)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.path}"]
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for finding in self.findings:
            key = (finding.severity, finding.rule, finding.reason, finding.todo)
            groups.setdefault(key, []).append(finding.where)
        for (severity, rule, reason, todo), where in groups.items():
            lines.append(f"{severity:<7}  {rule}: {where[0]}")
            lines += [f"{'':9}{'':{len(rule)}}  {other}" for other in where[1:]]
            lines += [f"{'':11}{reason}", f"{'':11}-> {todo}"]
        counts = [sum(f.severity == severity for f in self.findings) for severity in SEVERITIES]
        names = ("error", "warning", "remark")
        lines.append(", ".join(f"{n} {name}{'s' * (n != 1)}" for n, name in zip(counts, names, strict=True)))
        return printable("\n".join(lines)) + "\n"


def lint(path: str | Path, flags: Flags | None = None, *, run: bool = True) -> Lint:
    """Looks at a model.

    Args:
      path: a version directory, or a base path, of which the latest version is looked at.
      flags: of the server.
      run: whether the model is loaded and called, in a process of its own; without, less is seen.

    Raises:
      TfoptError: there is no model.
    """
    flags = flags or Flags()
    directory, base = files.find(Path(path))
    if not (directory / "saved_model.pb").is_file() and (directory / tflite.FILE).is_file():
        return Lint(str(directory), flags, _tflite_alone(directory, base, flags))
    try:
        meta = read_meta_graph(directory)
    except TfoptError as error:
        reason = str(error).removeprefix(f"{directory}: ").removeprefix(f"{directory / 'saved_model.pb'}: ")
        finding = Finding("unreadable", ERROR, "saved_model.pb", reason, "export the model again")
        return Lint(str(directory), flags, (finding,))
    return Lint(str(directory), flags, tuple(findings(Subject(directory, base, flags, meta, run=run))))


def _tflite_alone(directory: Path, base: Path | None, flags: Flags) -> tuple[Finding, ...]:
    """Of a version that holds a TFLite file and no SavedModel, which TensorFlow Serving takes by one flag only."""
    if not flags.prefer_tflite_model:
        reason = f"is not there, and {tflite.FILE} is served with --prefer_tflite_model only"
        return (Finding("unreadable", ERROR, "saved_model.pb", reason, "add --prefer_tflite_model"),)
    subject = Subject(directory, base, flags, MetaGraphDef(), run=False)
    return tuple(finding for rule in (*tflite.RULES, files.model_config_file) for finding in rule(subject))


def findings(subject: Subject) -> Sequence[Finding]:
    """What all rules find, the worst first, each once."""
    found = dict.fromkeys(finding for rule in RULES for finding in rule(subject))
    return sorted(found, key=lambda f: SEVERITIES.index(f.severity))
