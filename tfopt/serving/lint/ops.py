"""Rules about ops: does stock TensorFlow Serving have them, and may they do what they do?"""

from __future__ import annotations

from collections.abc import Iterator

from tfopt import hazards
from tfopt.opportunities import probable_bugs
from tfopt.serving.lint.graph import must_compile
from tfopt.serving.lint.subject import ERROR, INFO, WARNING, Finding, Subject

# What tensorflow_model_server links beside TensorFlow's own: tensorflow_text and the inference of decision forests.
_LINKED = (
    *("TFText>", "SimpleML", "Sentencepiece", "Wordpiece", "FastWordpiece", "FastBert", "FastSentencepiece"),
    *("WhitespaceTokenize", "UnicodeScriptTokenize", "RegexSplit", "CaseFoldUTF8", "NormalizeUTF8", "SplitMerge"),
)
_NAMED = 3  # nodes of a kind that are named


def operations(subject: Subject) -> Iterator[Finding]:
    """Custom ops, Python, code, files and connections."""
    groups: dict[tuple[str, str], list[hazards.Hazard]] = {}
    for hazard in subject.hazards:
        if hazard.used_by or hazard.kind == hazards.MISSING:  # what no signature runs does not matter
            groups.setdefault((hazard.kind, hazard.op), []).append(hazard)
    for (kind, op), found in groups.items():
        names = ", ".join(h.node for h in found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
        where = f"{op} {names}"
        users = ", ".join(dict.fromkeys(user for h in found for user in h.used_by)) or "nothing that is called"
        if kind == hazards.MISSING and op.startswith(_LINKED):
            yield Finding(
                "linked-op", INFO, where,
                "TensorFlow lacks it; tensorflow_model_server has tensorflow_text and decision forests linked",
                "serve with the release that matches the library; nothing was run here",
            )  # fmt: skip
        elif kind == hazards.MISSING:
            yield Finding(
                "custom-op", ERROR, where, "stock TensorFlow Serving does not have it: the model does not load",
                "link the op into a server of your own, or export without it",
            )  # fmt: skip
        elif kind == hazards.PYTHON:
            yield Finding(
                "python-op", ERROR, where, f"it calls Python, and the server has none (used by {users})",
                "write it in TensorFlow ops",
            )  # fmt: skip
        else:
            yield Finding(
                "outside-world", WARNING, where,
                f"it {kind}{' ' + found[0].detail if found[0].detail else ''} (used by {users})",
                "check that the container may, and has what it wants",
            )  # fmt: skip


def xla(subject: Subject) -> Iterator[Finding]:
    """jit_compile needs a flag of the server."""
    found = [] if subject.flags.xla_cpu_compilation_enabled else must_compile(subject.meta)
    if found:
        yield Finding(
            "jit-compile", ERROR, ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else ""),
            "jit_compile=True: the server refuses to compile it, so that requests fail",
            "start it with --xla_cpu_compilation_enabled, or export with jit_compile=False",
        )  # fmt: skip


def probably_wrong(subject: Subject) -> Iterator[Finding]:
    """Random numbers, dropout at serving time, weights that are not finite."""
    for text in probable_bugs(subject.meta, subject.model, ()) if subject.model else ():
        if "no kernel" not in text:  # seen in a run
            reason, _, rest = text.partition(": ")
            yield Finding("probable-bug", WARNING, rest or "graph", reason, "export the model for inference")


RULES = (operations, xla, probably_wrong)
