"""Configuration files: which models to serve, and where Prometheus finds the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from tensorflow_serving.config import model_server_config_pb2

from tfopt.errors import TfoptError
from tfopt.serving.server.errors import invalid

METRICS_PATH = "/monitoring/prometheus/metrics"


def read(path: str) -> Any:
    """A ModelServerConfig in text form.

    Raises:
      TfoptError: it cannot be read or holds no model; names the file and the line.
    """
    try:
        found = text_format.Parse(Path(path).read_text(encoding="utf-8"), model_server_config_pb2.ModelServerConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise TfoptError(f"{path}: cannot be read as a ModelServerConfig: {error}") from error
    if found.WhichOneof("config") == "custom_model_config":
        raise TfoptError(f"{path}: custom_model_config is not supported; list the models in model_config_list")
    return found


def models(config: Any) -> dict[str, Any]:
    """The ModelConfigs of a ModelServerConfig by name.

    Raises:
      ServingError: INVALID_ARGUMENT: what TensorFlow Serving refuses too.
    """
    found: dict[str, Any] = {}
    for model in config.model_config_list.config:
        if model.name in found:
            raise invalid(f"Illegal to list model {model.name} multiple times in config list")
        if not model.name or not model.base_path:
            raise invalid(f"Model {model.name!r} needs both a name and a base_path")
        if (model.model_platform or "tensorflow") != "tensorflow":
            raise invalid(
                f"Model {model.name}: model_platform {model.model_platform!r}: only tensorflow is served here"
            )
        found[model.name] = model
    return found


def metrics_path(path: str | None) -> str | None:
    """Where the metrics are, by a text such as `prometheus_config { enable: true, path: "/metrics" }`; None: nowhere.

    Args:
      path: the file; None for the default path.

    Raises:
      TfoptError: it is not such a file.
    """
    if path is None:
        return METRICS_PATH
    try:
        found: Any = text_format.Parse(Path(path).read_text(encoding="utf-8"), _monitoring()())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise TfoptError(f"{path}: cannot be read as a MonitoringConfig: {error}") from error
    prometheus = found.prometheus_config
    return (prometheus.path or METRICS_PATH) if prometheus.enable else None


def _monitoring() -> type:
    """The class of MonitoringConfig, in a pool of its own: tensorflow-serving-api lacks the proto."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tfopt/monitoring.proto", package="tensorflow.serving")
    file.syntax = "proto3"
    prometheus = file.message_type.add(name="PrometheusConfig")
    prometheus.field.add(name="enable", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_BOOL)
    prometheus.field.add(name="path", number=2, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
    monitoring = file.message_type.add(name="MonitoringConfig")
    monitoring.field.add(
        name="prometheus_config", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE,
        type_name=".tensorflow.serving.PrometheusConfig",
    )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.serving.MonitoringConfig"))
