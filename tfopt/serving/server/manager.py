"""Which versions of which models are loaded: new ones before old ones go, and none goes while a request is in it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2

from tfopt.errors import one_line
from tfopt.serving.server.errors import ServingError, from_tensorflow, invalid, not_found
from tfopt.serving.server.servable import Servable, log
from tfopt.serving.server.versions import aspired, stamp

START, LOADING, AVAILABLE, UNLOADING, END = map(
    get_model_status_pb2.ModelVersionStatus.State.Value, ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]
)

Load = Callable[[str, int, Path], Servable]


@dataclasses.dataclass
class Version:
    """One version directory, from the time that it was first wanted; END ones stay for GetModelStatus."""

    number: int
    path: Path
    state: int = START
    error: ServingError | None = None
    stamp: tuple = ()
    servable: Servable | None = None
    requests: int = 0  # in flight


class Model:
    """The versions of one model, by number."""

    def __init__(self, config: Any):
        self.config = config
        self.versions: dict[int, Version] = {}
        self.latest: Version | None = None

    def choose_latest(self) -> None:
        """Points `latest` to the highest version that is available."""
        self.latest = max(
            (v for v in self.versions.values() if v.state == AVAILABLE), key=lambda v: v.number, default=None
        )


class Manager:
    """Loads and unloads; every method may be called from any thread."""

    def __init__(self, load: Load, threads: int = 0, labels_need_available: bool = True):
        self._load = load
        self._labels_need_available = labels_need_available
        self._models: dict[str, Model] = {}
        self._lock = threading.Condition()
        self._polling = threading.Lock()
        self._pool = ThreadPoolExecutor(threads or 2, "load")

    def configure(self, models: dict[str, Any]) -> None:
        """Replaces the models served, each a ModelConfig, and waits until each of them has a version to answer.

        Raises:
          ServingError: one has none; the others are served.
        """
        with self._polling:
            with self._lock:
                self._check_labels(models)
                gone = {name: model for name, model in self._models.items() if name not in models}
                for name, config in models.items():
                    model = self._models.setdefault(name, Model(config))
                    model.config = config
            self._reconcile()
            with self._lock:
                for name in gone:
                    del self._models[name]
            for name, model in gone.items():
                self._unload(name, model, set())
        self._require(models)

    def poll(self) -> None:
        """Looks at the version directories once, and does what is to be done; what fails is said in the log."""
        try:
            with self._polling:
                self._reconcile()
        except Exception:
            log.exception("looking for versions failed")

    @contextlib.contextmanager
    def using(self, spec: Any) -> Iterator[Servable]:
        """The servable that a ModelSpec asks for; it stays loaded inside the block.

        Raises:
          ServingError: INVALID_ARGUMENT without a name or with an unknown label, NOT_FOUND where none is available.
        """
        with self._lock:
            version = self._find(spec)
            version.requests += 1
        try:
            yield version.servable  # type: ignore[misc]
        finally:
            with self._lock:
                version.requests -= 1
                if not version.requests and version.state == UNLOADING:
                    self._lock.notify_all()

    def status(self, spec: Any) -> list[Version]:
        """The versions of a model, highest first; one where the spec names it.

        Raises:
          ServingError: INVALID_ARGUMENT without a name, NOT_FOUND where there is none.
        """
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        with self._lock:
            model = self._models.get(spec.name)
            versions = sorted(model.versions.values(), key=lambda v: -v.number) if model else []
            if spec.WhichOneof("version_choice"):
                wanted = self._number(spec)
                versions = [v for v in versions if v.number == wanted]
                if not versions:
                    raise not_found(f"Could not find version {wanted} of model {spec.name}")
            if not versions:
                raise not_found(f"Could not find any versions of model {spec.name}")
            return [dataclasses.replace(v, servable=None) for v in versions]

    def close(self) -> None:
        """Unloads everything."""
        with self._polling:
            for name, model in self._models.items():
                self._unload(name, model, set())
        self._pool.shutdown()

    def _find(self, spec: Any) -> Version:
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        model = self._models.get(spec.name)
        if not spec.WhichOneof("version_choice"):
            if model is None or model.latest is None:
                raise not_found(f"Servable not found for request: Latest({spec.name})")
            return model.latest
        number = self._number(spec)
        version = model.versions.get(number) if model else None
        if version is None or version.state != AVAILABLE:
            raise not_found(f"Servable not found for request: Specific({spec.name}, {number})")
        return version

    def _number(self, spec: Any) -> int:
        if spec.WhichOneof("version_choice") == "version":
            return spec.version.value
        model = self._models.get(spec.name)
        if model is None or spec.version_label not in model.config.version_labels:
            raise invalid(f"Unrecognized servable version label: {spec.version_label}")
        return model.config.version_labels[spec.version_label]

    def _check_labels(self, models: dict[str, Any]) -> None:
        for name, config in models.items():
            known = self._models[name].versions if name in self._models else {}
            for label, number in config.version_labels.items():
                version = known.get(number)
                available = version is not None and version.state == AVAILABLE
                before = self._models[name].config.version_labels if name in self._models else {}
                if self._labels_need_available and not available and before.get(label) != number:
                    raise ServingError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label {label} to version {number} of model {name}, which is not currently "
                        "available for inference",
                    )

    def _require(self, models: dict[str, Any]) -> None:
        missing = []
        with self._lock:
            for name, config in models.items():
                model = self._models[name]
                if model.latest is None:
                    failed = max((v for v in model.versions.values() if v.error), key=lambda v: v.number, default=None)
                    why = f"version {failed.number}: {failed.error}" if failed else f"no versions in {config.base_path}"
                    missing.append(f"{{name: {name}}} due to error: {why}")
        if missing:
            message = f"{len(missing)} servable(s) did not become available: {{{'; '.join(missing)}}}"
            raise ServingError(grpc.StatusCode.UNKNOWN, message)

    def _reconcile(self) -> None:
        work = []
        # Where the folder itself cannot be seen (a mount that is gone), nothing is to be concluded from that.
        models = {n: m for n, m in self._models.items() if Path(m.config.base_path).is_dir()}
        for name, model in models.items():
            paths = aspired(model.config)
            for number, path in paths.items():
                known, now = model.versions.get(number), stamp(path)
                # What failed is tried again when its files change: a copy that was under way, for instance.
                if known is None or (known.state == END and (known.error is None or known.stamp != now)):
                    version = Version(number, path, stamp=now)
                    with self._lock:
                        model.versions[number] = version
                    work.append((model, self._pool.submit(self._load_version, name, model, version)))
        for _, done in work:
            done.result()
        for name, model in models.items():
            keep = set(aspired(model.config)) & set(model.versions)
            if not keep or any(model.versions[number].state == AVAILABLE for number in keep):
                self._unload(name, model, keep)

    def _load_version(self, name: str, model: Model, version: Version) -> None:
        self._set(model, version, LOADING)
        log.info("loading version %d of %s from %s", version.number, name, version.path)
        try:
            servable = self._load(name, version.number, version.path)
        except Exception as error:
            failed = error if isinstance(error, ServingError) else from_tensorflow(error)
            version.error = ServingError(failed.code, one_line(error))
            self._set(model, version, END)
            log.error("version %d of %s cannot be loaded: %s", version.number, name, version.error.message)
            return
        version.servable = servable
        self._set(model, version, AVAILABLE)
        log.info("serving version %d of %s", version.number, name)

    def _unload(self, name: str, model: Model, keep: set[int]) -> None:
        for version in list(model.versions.values()):
            if version.number in keep or version.state != AVAILABLE:
                continue
            self._set(model, version, UNLOADING)
            with self._lock:
                while version.requests:
                    self._lock.wait()
            servable, version.servable = version.servable, None
            servable.close()  # type: ignore[union-attr]
            del servable
            self._set(model, version, END)
            log.info("unloaded version %d of %s", version.number, name)

    def _set(self, model: Model, version: Version, state: int) -> None:
        with self._lock:
            version.state = state
            model.choose_latest()


def quiet() -> None:
    """Holds back TensorFlow's Python warnings, which are about how SavedModels are loaded."""
    tf.get_logger().setLevel("ERROR")
