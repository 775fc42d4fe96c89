"""TensorFlow Serving's --model_config_file: the models of a server, as a ModelServerConfig in text."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from tfopt.errors import TfoptError

FILE = "models.config"


def text(model_name: str, base_path: str) -> str:
    """A ModelServerConfig of one model, as text that TensorFlow Serving reads."""
    config = ModelServerConfig()
    config.model_config_list.config.add(name=model_name, base_path=base_path, model_platform="tensorflow")
    head = "# For --model_config_file, where the base path is mounted as below; add models, or\n"
    head += (
        "#   model_version_policy { specific { versions: 1 versions: 2 } }   to serve more than the latest version.\n"
    )
    return head + text_format.MessageToString(config, as_utf8=True)


def read(path: str | Path) -> ModelServerConfig:
    """Reads a --model_config_file.

    Raises:
      TfoptError: it cannot be read.
    """
    try:
        return text_format.Parse(Path(path).read_text(encoding="utf-8"), ModelServerConfig())
    except (OSError, UnicodeDecodeError) as error:
        raise TfoptError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except text_format.ParseError as error:
        raise TfoptError(f"{path}: is no model server configuration: {error}") from error
