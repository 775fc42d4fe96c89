"""A server of small models, shared by the tests of what it answers."""

import grpc
import pytest
from tensorflow_serving.apis import prediction_service_pb2_grpc

from tests.serving.server.models import half_plus, two_inputs
from tfopt.serving.server.child import running

CONFIG = """
model_config_list {{
  config {{
    name: "half" base_path: "{0}/half" model_platform: "tensorflow"
    model_version_policy {{ specific {{ versions: 1 versions: 2 }} }}
    version_labels {{ key: "stable" value: 1 }}
  }}
  config {{ name: "two" base_path: "{0}/two" model_platform: "tensorflow" }}
}}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    half_plus(root / "half", 1, plus=2)
    half_plus(root / "half", 2, plus=3)
    two_inputs(root / "two")
    (root / "models.config").write_text(CONFIG.format(root))
    (root / "monitoring.config").write_text('prometheus_config { enable: true, path: "/metrics" }')
    return root


@pytest.fixture(scope="session")
def server(models):
    flags = [
        f"--model_config_file={models}/models.config",
        "--allow_version_labels_for_unavailable_models",
        "--file_system_poll_wait_seconds=0.2",
        f"--monitoring_config_file={models}/monitoring.config",
    ]
    with running(flags) as started:
        yield started


@pytest.fixture(scope="session")
def channel(server):
    with grpc.insecure_channel(server.grpc) as made:
        yield made


@pytest.fixture(scope="session")
def stub(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)
