"""Rules about files: does the server find a model, and is it whole?"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from pathlib import Path

from tfopt.errors import TfoptError
from tfopt.report_words import size
from tfopt.serving import model_config
from tfopt.serving.deployment_text import estimate
from tfopt.serving.lint.subject import ERROR, INFO, WARNING, Finding, Subject

_LARGE_GRAPH = 128 << 20  # docs/serving.md: beyond it, loading takes long and memory is many times this
_LIMIT = (2 << 30) - 1
_VARIABLES = ("VarHandleOp", "Variable", "VariableV2")


def serve_tag(subject: Subject) -> Iterator[Finding]:
    """TensorFlow Serving loads the MetaGraph with the tag `serve`."""
    tags = list(subject.meta.meta_info_def.tags)
    if tags != ["serve"]:
        yield Finding(
            "serve-tag", ERROR, "saved_model.pb", f"the graph is tagged {tags}, and the server loads ['serve']",
            "export it with the tag `serve` alone, or start the server with "
            f"--saved_model_tags={','.join(tags) or '...'}",
        )  # fmt: skip


def version_names(subject: Subject) -> Iterator[Finding]:
    """A version is a directory whose name is a number."""
    if subject.base is None:
        if not subject.directory.name.isdecimal():
            yield Finding(
                "version-name", INFO, subject.directory.name, "the server loads directories named by a number",
                "put the model into a directory such as NAME/1, and give NAME as --model_base_path",
            )  # fmt: skip
        return
    for path in sorted(subject.base.iterdir()):
        if path.is_dir() and not path.name.isdecimal() and (path / "saved_model.pb").is_file():
            yield Finding(
                "version-name", WARNING, path.name, "it is a SavedModel, but no number: the server ignores it",
                "name it by a number, or move it elsewhere",
            )  # fmt: skip
    numbers = collections.Counter(int(p.name) for p in subject.base.iterdir() if p.is_dir() and p.name.isdecimal())
    for number, count in numbers.items():
        if count > 1:
            yield Finding(
                "version-name", WARNING, str(number), f"{count} directories are this version: one is served",
                "keep one of them",
            )  # fmt: skip


def whole(subject: Subject) -> Iterator[Finding]:
    """The checkpoint and the assets that the graph reads are there."""
    needs = subject.meta.saver_def.restore_op_name and any(
        node.op in _VARIABLES
        for body in (subject.meta.graph_def.node, *(f.node_def for f in subject.meta.graph_def.library.function))
        for node in body
    )
    folder = subject.directory / "variables"
    index, shards = folder / "variables.index", sorted(folder.glob("variables.data-*"))
    if needs and not index.is_file():
        yield Finding(
            "files-missing", ERROR, "variables/variables.index", "the graph restores variables, and it is not there",
            "copy the whole SavedModel, variables/ included",
        )  # fmt: skip
    elif index.is_file():
        counts = {int(m[1]) for p in shards if (m := re.search(r"-of-(\d+)$", p.name))}
        if not shards or len(shards) < max(counts, default=1):
            yield Finding(
                "files-missing", ERROR, "variables/",
                f"{len(shards)} of {max(counts, default=1)} files variables.data-* are there", "copy all of them",
            )  # fmt: skip
    for asset in subject.meta.asset_file_def:
        if not (subject.directory / "assets" / asset.filename).is_file():
            loads = subject.run and not subject.probe.load_error
            yield Finding(
                "files-missing", WARNING if loads else ERROR, f"assets/{asset.filename}",
                f"the graph names this asset, and it is not there{'; loading did not need it' if loads else ''}",
                "copy the whole SavedModel, assets/ included",
            )  # fmt: skip


def graph_size(subject: Subject) -> Iterator[Finding]:
    """saved_model.pb can have 2 GiB, and is copied several times while it loads."""
    found = (subject.directory / "saved_model.pb").stat().st_size
    if found > _LIMIT:
        reason, severity = f"{size(found)} are more than a protobuf can hold (2 GiB)", ERROR
    elif found > _LARGE_GRAPH:
        reason, severity = f"{size(found)} of graph and constants: loading takes many times that in memory", WARNING
    else:
        return
    yield Finding(
        "graph-size", severity, "saved_model.pb", reason,
        "keep weights in variables (tfopt-optimize --max_constant_bytes)",
    )  # fmt: skip


def memory(subject: Subject) -> Iterator[Finding]:
    """The model fits the container, also twice: a new version loads beside the old one."""
    given = subject.flags.memory_bytes
    if given is None:
        return
    needed = estimate(subject.directory)
    if needed > given:
        yield Finding(
            "memory", ERROR, f"--memory_bytes={given}", f"loading takes about {size(needed)}, estimated from its files",
            "give more, or make the model smaller (tfopt-optimize)",
        )  # fmt: skip
    elif 2 * needed > given:
        yield Finding(
            "memory", WARNING, f"--memory_bytes={given}",
            f"two versions take about {size(2 * needed)}, and a new one loads while the old one serves",
            "give more, or restart servers for a new version",
        )  # fmt: skip


def model_config_file(subject: Subject) -> Iterator[Finding]:
    """--model_config_file is one that the server takes."""
    path = subject.flags.model_config_file
    if not path:
        return
    try:
        configs = model_config.read(path).model_config_list.config
    except TfoptError as error:
        yield Finding("model-config", ERROR, path, str(error).removeprefix(f"{path}: "), "correct the file")
        return
    for name, count in collections.Counter(config.name for config in configs).items():
        if count > 1:
            yield Finding(
                "model-config", ERROR, path, f"{count} models are called {name!r}: the server refuses the file",
                "give each its own name",
            )  # fmt: skip
    for config in configs:
        where = f"{path}: {config.name or 'a model without a name'}"
        if not config.name or not config.base_path:
            yield Finding("model-config", ERROR, where, "has no name or no base_path", "give both")
        elif not config.base_path.startswith("/") and "://" not in config.base_path:
            yield Finding(
                "model-config", ERROR, where, f"base_path {config.base_path!r} is relative", "write an absolute path"
            )
        if config.model_platform != "tensorflow":
            yield Finding(
                "model-config", ERROR, where, f"model_platform is {config.model_platform!r}",
                'write model_platform: "tensorflow"',
            )  # fmt: skip
    if not configs:
        yield Finding("model-config", ERROR, path, "lists no model", "add model_config_list { config { ... } }")


def unservable_files(subject: Subject) -> Iterator[Finding]:
    """Names that hide from the server: batching parameters that no flag reads, a TFLite file that nobody prefers."""
    flags, directory = subject.flags, subject.directory
    per_model = directory / "batching_params.pbtxt"
    if per_model.is_file() and not (flags.enable_batching and flags.enable_per_model_batching_parameters):
        yield Finding(
            "unused-file", INFO, per_model.name, "no flag reads it",
            "start the server with --enable_batching --enable_per_model_batching_parameters",
        )  # fmt: skip
    if (directory / "model.tflite").is_file() and not flags.prefer_tflite_model:
        yield Finding(
            "unused-file", INFO, "model.tflite", "the server reads saved_model.pb",
            "start it with --prefer_tflite_model to serve this instead",
        )  # fmt: skip


RULES = (serve_tag, version_names, whole, graph_size, memory, model_config_file, unservable_files)


def find(path: Path) -> tuple[Path, Path | None]:
    """The version directory of a path, and the base path if it is one.

    Raises:
      TfoptError: it is neither.
    """
    if not path.is_dir():
        raise TfoptError(f"--model={path}: no such directory; give a version directory or the base path above it")
    if any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt", "model.tflite")):
        return path, None
    versions = [p for p in path.iterdir() if p.is_dir() and p.name.isdecimal()]
    if not versions:
        raise TfoptError(f"--model={path}: holds no saved_model.pb, and no version directory named 1, 2, ...")
    return max(versions, key=lambda p: int(p.name)), path
