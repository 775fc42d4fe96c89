"""The options of a deployment, and its texts: what the templates beside this file are filled with."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from tfopt.serving.batching_parameters import BatchingParameters

IMAGE = "tensorflow/serving:latest"
COMPOSE, KUBERNETES, SERVE = "compose.j2", "kubernetes.j2", "serve_sh.j2"  # templates
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written.

    Attributes:
      batching: the parameters; None for values to start from.
      enable_batching: False leaves batching off.
      per_model_batching: whether the version directory gets its own batching_params.pbtxt.
      warmup: whether warmup requests are written.
      warmup_sizes: their batch sizes; empty: the allowed batch sizes, or 1 without batching.
      data: a source of real rows for them (see `tfopt.data.load`).
      session_config: whether session overrides are measured, and written where they gain.
      peak_memory_bytes: of a process that loaded and ran the model; None: it is measured on the warmup requests, or
        estimated from the files where there are none.
      cpus: of a container, and threads of the server.
      image: of the model server.
      min_replicas, max_replicas: of the autoscaler.
      seed: of drawn inputs.
    """

    batching: BatchingParameters | None = None
    enable_batching: bool = True
    per_model_batching: bool = False
    warmup: bool = True
    warmup_sizes: tuple[int, ...] = ()
    data: str | None = None
    session_config: bool = True
    peak_memory_bytes: int | None = None
    cpus: int = 2
    image: str = IMAGE
    min_replicas: int = 2
    max_replicas: int = 10
    seed: int = 0


def facts(model_name: str, mount: str, directory: Path, options: Options) -> dict[str, Any]:
    """What the templates show.

    Args:
      model_name: what clients call the model.
      mount: the base path inside a container.
      directory: the version directory.
      options: what is written.
    """
    peak = options.peak_memory_bytes
    how = "as measured" if peak else "as estimated from its files"
    peak = peak or estimate(directory)
    request = -(-int(1.25 * peak) // (64 * _MIB)) * 64
    status = f"/v1/models/{model_name}"
    image_note = f"{options.image} is used"
    if options.image == IMAGE:
        image_note = "Pin the image: tags follow TensorFlow Serving's releases, which come later than TensorFlow's"
    return {
        "name": model_name,
        "service": re.sub(r"[^a-z0-9]+", "-", model_name.lower()).strip("-")[:50] or "model",
        "mount": mount,
        "status": status,
        "image": options.image,
        "image_note": image_note,
        "memory_note": f"Memory: the peak of a process that loads and runs the model, {how}: {peak // _MIB} MiB; a "
        "quarter more is requested, and the limit is twice that, since a new version loads beside the old one",
        "memory_request": request,
        "memory_limit": 2 * request,
        "cpus": options.cpus,
        "startup_s": 300,
        "startup_tries": 60,
        "min_replicas": options.min_replicas,
        "max_replicas": options.max_replicas,
        "health": f"exec 3<>/dev/tcp/127.0.0.1/8501 && printf 'GET {status} HTTP/1.0\\r\\n\\r\\n' >&3 && "
        "grep -q AVAILABLE <&3",
    }


def estimate(directory: Path) -> int:
    """Peak memory of a process that loads a model, from the table in docs/serving.md: constants are copied often."""
    graph = (directory / "saved_model.pb").stat().st_size
    others = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) - graph
    return 600 * _MIB + 15 * graph + 2 * others


def render(template: str, facts: dict[str, Any], flags: list[str]) -> str:
    """The text of a template: of the facts, and of the flags of the server."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["tojson"] = json.dumps  # jinja2's own escapes what HTML would read otherwise
    source = resources.files("tfopt.serving").joinpath(template).read_text("utf-8")
    return environment.from_string(source).render(**facts, flags=flags)
