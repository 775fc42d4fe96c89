"""Rules about warmup requests: a bad one keeps the model from loading."""

from __future__ import annotations

from collections.abc import Iterator

from tfopt.errors import TfoptError
from tfopt.serving import warmup
from tfopt.serving.lint.subject import ERROR, INFO, WARNING, Finding, Subject

_FILE = str(warmup.FILE)
_WRITE = "write it anew: tfopt-deployment --overwrite"


def requests(subject: Subject) -> Iterator[Finding]:
    """They can be read, are few enough, and ask for what the model has."""
    if not subject.flags.enable_model_warmup:
        return
    path = subject.directory / warmup.FILE
    if not path.is_file():
        yield Finding(
            "no-warmup", INFO, _FILE, "without it the first requests wait for what the server prepares lazily",
            "write it: tfopt-deployment",
        )  # fmt: skip
        return
    targets: list[str] = []
    try:
        for log in warmup.read(path):
            targets.append(warmup.target(log)[1])
    except TfoptError as error:
        yield Finding("warmup-fails", ERROR, _FILE, str(error).removeprefix(f"{path}: "), _WRITE)
        return
    if len(targets) > warmup.MOST:
        yield Finding(
            "warmup-too-many", ERROR, _FILE, f"{len(targets):,} requests: more than {warmup.MOST:,} fail the load",
            "keep fewer",
        )  # fmt: skip
    gone = sorted(set(targets) - set(subject.signatures))
    if gone:
        yield Finding(
            "warmup-stale", ERROR, _FILE, f"it asks for {', '.join(map(repr, gone))}, which the model does not have",
            _WRITE,
        )  # fmt: skip
    elif subject.probe.warmup_error:
        yield Finding(
            "warmup-fails", ERROR, _FILE, f"a request fails, and with it the load: {subject.probe.warmup_error}", _WRITE
        )
    cold = [name for name in subject.signatures if name not in targets and name not in subject.state]
    if cold:
        yield Finding("warmup-incomplete", INFO, _FILE, f"it has no request for {', '.join(map(repr, cold))}", _WRITE)
    for name in sorted(set(targets) & subject.state.keys()):
        yield Finding(
            "warmup-state", WARNING, f"signature {name!r}",
            f"it assigns {subject.state[name]}: the server starts from what the warmup left there",
            "leave it out of the warmup",
        )  # fmt: skip


RULES = (requests,)
