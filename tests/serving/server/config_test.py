import pytest

from tfopt.errors import TfoptError
from tfopt.serving.server import config
from tfopt.serving.server.errors import ServingError


def written(tmp_path, text):
    (tmp_path / "file").write_text(text)
    return str(tmp_path / "file")


@pytest.mark.parametrize(
    "text, path",
    [
        (None, "/monitoring/prometheus/metrics"),
        ('prometheus_config { enable: true, path: "/m" }', "/m"),
        ("prometheus_config: { enable: true }  # default path", "/monitoring/prometheus/metrics"),
        ('prometheus_config { path: "/m" enable: false }', None),
        ("", None),
    ],
)
def test_where_metrics_are(tmp_path, text, path):
    assert config.metrics_path(text if text is None else written(tmp_path, text)) == path


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TfoptError, match=r"none: cannot be read as a MonitoringConfig"):
        config.metrics_path(str(tmp_path / "none"))
    with pytest.raises(TfoptError, match=r"file: cannot be read as a ModelServerConfig: .*has no field named \"nam\""):
        config.read(written(tmp_path, 'model_config_list { config { nam: "a" } }'))
    with pytest.raises(TfoptError, match="custom_model_config is not supported"):
        config.read(written(tmp_path, "custom_model_config {}"))


@pytest.mark.parametrize(
    "text, words",
    [
        ('config { name: "a" base_path: "/a" } config { name: "a" base_path: "/b" }', "list model a multiple times"),
        ('config { name: "a" }', "needs both a name and a base_path"),
        ('config { name: "a" base_path: "/a" model_platform: "onnx" }', "only tensorflow is served here"),
    ],
)
def test_models_that_cannot_be_served(tmp_path, text, words):
    with pytest.raises(ServingError, match=words):
        config.models(config.read(written(tmp_path, f"model_config_list {{ {text} }}")))
