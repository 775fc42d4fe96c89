"""What a deployment needs beside a model: server flags, batching, warmup, Docker Compose, Kubernetes.

    base_path/
      1/                       the model; gets assets.extra/tf_serving_warmup_requests
      batching_params.pbtxt    --batching_parameters_file; left out where a batch cannot be made of requests
      models.config            --model_config_file, as containers see the model: below /models
      docker-compose.yaml  kubernetes.yaml  serve.sh

TensorFlow Serving looks at numeric names in a base path only, so that nothing of this disturbs it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError
from tfopt.inline import INIT_SIGNATURE, TRAIN_SIGNATURE
from tfopt.model import read_meta_graph
from tfopt.publish import Workspace
from tfopt.serving import batching_parameters, deployment_text, model_config, session_config, warmup
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.deployment_text import Options
from tfopt.serving.lint.graph import must_compile, unbatchable

BATCHING, CONFIG = batching_parameters.FILE, model_config.FILE
COMPOSE, KUBERNETES, SERVE = "docker-compose.yaml", "kubernetes.yaml", "serve.sh"
FILES = (BATCHING, CONFIG, COMPOSE, KUBERNETES, SERVE)  # beside the version directories


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What was written.

    Attributes:
      paths: of all files.
      notes: what a reader should know, and what was not written and why, in sentences.
      command: the line that serves the model.
    """

    paths: list[Path]
    notes: list[str]
    command: str


def files(base_dir: str | Path, model_name: str, version: int, options: Options | None = None) -> Deployment:
    """Writes everything into a base path.

    Args:
      base_dir: holds the version directory; may be the draft of one that is moved later, no file names it.
      model_name: what clients call the model.
      version: the version directory to prepare.
      options: what to write.

    Raises:
      TfoptError: the model cannot be read, or an option is wrong.
    """
    options = options or Options()
    base, directory = Path(base_dir), Path(base_dir) / str(version)
    _check(model_name, options)
    meta = read_meta_graph(directory)
    signatures = {k: s for k, s in meta.signature_def.items() if k not in (INIT_SIGNATURE, TRAIN_SIGNATURE)}
    written, notes = [], []

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)

    why_not = [f"signature {n!r}: {' '.join(p)}" for n, s in sorted(signatures.items()) for p in unbatchable(s)]
    parameters = None
    if not options.enable_batching:
        notes.append(f"no {BATCHING}: batching is left off")
    elif why_not:
        notes.append(f"no {BATCHING}: the model cannot be batched: {why_not[0]}")
    else:
        parameters = options.batching or start_values(options.cpus)
        head = "" if options.batching else "# Values to start from: tfopt-tune-batching measures the model's own.\n"
        write(base / BATCHING, head + parameters.text())
        if options.per_model_batching:
            write(directory / BATCHING, head + parameters.text())
        if head:
            notes.append(f"{BATCHING} holds values to start from; tfopt-tune-batching measures the model's own")
    if options.warmup:
        allowed = parameters.allowed_batch_sizes if parameters else ()
        sizes = options.warmup_sizes or allowed or (1,)
        summary = warmup.write(directory, sizes, options.data, model_name=model_name, seed=options.seed)
        notes += summary.lines()
        written += [summary.path] if summary.path else []
        if summary.path and not options.peak_memory_bytes:
            options = dataclasses.replace(options, peak_memory_bytes=_peak_memory(directory, summary.path))
        overrides = directory / session_config.FILE
        if session_config.of_others(directory):
            notes.append(f"{session_config.FILE} was there already, and is kept as it is")
        elif summary.path and options.session_config:
            gain = session_config.measure(directory, list(warmup.read(summary.path)))
            notes.append(gain.line())
            if gain.worth:
                overrides.write_bytes(session_config.serialized())
                written.append(overrides)

    if (directory / "model.tflite").is_file():
        notes.append(
            "model.tflite is there: --prefer_tflite_model serves it; tfopt-lint-serving says what that changes"
        )

    mount = f"/models/{model_name}"
    write(base / CONFIG, model_config.text(model_name, mount))
    common = [
        "--port=8500",
        "--rest_api_port=8501",
        *(["--enable_batching=true", "--batching_parameters_file={}/" + BATCHING] if parameters else []),
        *(["--enable_per_model_batching_parameters=true"] if parameters and options.per_model_batching else []),
        *(["--xla_cpu_compilation_enabled=true"] if must_compile(meta) else []),
        f"--tensorflow_intra_op_parallelism={options.cpus}",
        f"--tensorflow_inter_op_parallelism={options.cpus}",
    ]
    common = [flag.replace("{}", mount) for flag in common]
    facts = deployment_text.facts(model_name, mount, directory, options)
    contained = [*common, f"--model_config_file={mount}/{CONFIG}"]
    write(base / COMPOSE, deployment_text.render(deployment_text.COMPOSE, facts, contained))
    monitored = [*contained, "--monitoring_config_file=/etc/tf-serving/monitoring.config"]
    write(base / KUBERNETES, deployment_text.render(deployment_text.KUBERNETES, facts, monitored))
    plain = [*common, f"--model_name={model_name}", f"--model_base_path={mount}"]
    write(
        base / SERVE, deployment_text.render(deployment_text.SERVE, facts, [f.replace(mount, '"$here"') for f in plain])
    )
    (base / SERVE).chmod(0o755)
    notes += [facts["image_note"], facts["memory_note"]]
    return Deployment(written, notes, " ".join(["tensorflow_model_server", *plain]))


def write(
    model_base_path: str | Path,
    model_name: str,
    options: Options | None = None,
    *,
    version: int | None = None,
    overwrite: bool = False,
) -> Deployment:
    """Writes everything beside the versions of a base path: all or nothing.

    Args:
      model_base_path: holds version directories.
      model_name: what clients call the model.
      options: what to write.
      version: the version directory to prepare; None for the latest.
      overwrite: whether existing files are replaced.

    Raises:
      TfoptError: there is no such version, a file exists, or the model cannot be read.
    """
    options = options or Options()
    base = Path(model_base_path)
    _check(model_name, options)
    latest = latest_version(base)
    version = latest if version is None else version
    source = base / str(version)
    if not source.is_dir():
        raise TfoptError(f"--model_base_path={base}: holds no version {version}; the latest is {latest}")
    inner = [warmup.FILE] if options.warmup else []
    inner += [Path(BATCHING)] if options.per_model_batching else []
    inner += [] if session_config.of_others(source) else [session_config.FILE]
    targets = [BATCHING, CONFIG, COMPOSE, KUBERNETES, SERVE, *(str(Path(str(version), p)) for p in inner)]
    with Workspace(base, targets, overwrite=overwrite, flag="--model_base_path") as workspace:
        draft = workspace.scratch / str(version)
        shutil.copytree(source, draft, copy_function=_link, ignore=lambda *_: [p.name for p in inner])
        made = files(workspace.scratch, model_name, version, options)
        for path in made.paths:
            shutil.move(path, workspace.path(str(path.relative_to(workspace.scratch))))
        workspace.publish()
        paths = [base / path.relative_to(workspace.scratch) for path in made.paths]
        mount, here = f"/models/{model_name}", str(base.resolve())
        return Deployment(paths, made.notes, made.command.replace(mount, here))


def latest_version(base: Path) -> int:
    """The highest version directory of a base path.

    Raises:
      TfoptError: there is none.
    """
    if not base.is_dir():
        raise TfoptError(f"--model_base_path={base}: no such directory")
    versions = [int(p.name) for p in base.iterdir() if p.name.isdecimal() and p.is_dir()]
    if not versions:
        hint = "it is a SavedModel itself; give the directory above" if (base / "saved_model.pb").is_file() else ""
        raise TfoptError(
            f"--model_base_path={base}: holds no version directory; {hint or 'versions are named 1, 2, ...'}"
        )
    return max(versions)


def start_values(cpus: int) -> BatchingParameters:
    """Batching parameters to start from: small batches, a wait of 1 ms, and a queue that answers or refuses soon."""
    return BatchingParameters(
        max_batch_size=32,
        batch_timeout_micros=1000,
        max_enqueued_batches=100,
        num_batch_threads=cpus,
        allowed_batch_sizes=(1, 2, 4, 8, 16, 32),
    )


def _check(model_name: str, options: Options) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", model_name):
        raise TfoptError(
            f"--model_name={model_name!r}: letters, digits, '_', '-' and '.' only: it becomes part of URLs and paths"
        )
    if options.cpus < 1 or options.min_replicas < 1 or options.max_replicas < options.min_replicas:
        raise TfoptError(
            f"--cpus and --min_replicas must be at least 1, --max_replicas at least --min_replicas; received "
            f"{options.cpus}, {options.min_replicas}, {options.max_replicas}"
        )


def _peak_memory(directory: Path, requests: Path) -> int | None:
    """The same, measured in a process of its own on the warmup requests; None where it fails."""
    with Child("tfopt.serving.warmup_replay:worker") as child:
        try:
            return child.ask((str(directory), str(requests)), timeout=600)
        except ChildError:
            return None


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).absolute())
