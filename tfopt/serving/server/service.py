"""What the server answers, whatever the protocol: from a request message to an answer message."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_management_pb2

from tfopt.serving.server import config, metrics
from tfopt.serving.server.errors import ServingError, invalid
from tfopt.serving.server.examples import classify, multi_inference, regress
from tfopt.serving.server.manager import Manager
from tfopt.serving.server.predict import predict
from tfopt.serving.server.servable import log

SIGNATURE_DEF = "signature_def"


class Service:
    """The calls of PredictionService and ModelService as plain functions; they block, and any thread may call them."""

    def __init__(self, manager: Manager, as_content: bool = False):
        self.manager = manager
        self._as_content = as_content
        self._calls: dict[str, Callable[[Any], Any]] = {
            "Predict": self._predict,
            "Classify": self._classify,
            "Regress": self._regress,
            "MultiInference": self._multi_inference,
            "GetModelMetadata": self._metadata,
            "GetModelStatus": self._status,
            "HandleReloadConfigRequest": self._reload,
        }

    def answer(self, call: str, request: Any, entrypoint: str = "GRPC") -> Any:
        """Answers a request, and counts it.

        Args:
          call: the name of the rpc.
          request: its message.
          entrypoint: GRPC or REST, for the metrics.

        Raises:
          ServingError: the request fails; what nobody foresaw is INTERNAL.
        """
        with counted(_model(request), call, entrypoint):
            return self._calls[call](request)

    def _predict(self, request: Any) -> Any:
        with self.manager.using(request.model_spec) as servable:
            return predict(servable, request, self._as_content)

    def _classify(self, request: Any) -> Any:
        with self.manager.using(request.model_spec) as servable:
            return classify(servable, request)

    def _regress(self, request: Any) -> Any:
        with self.manager.using(request.model_spec) as servable:
            return regress(servable, request)

    def _multi_inference(self, request: Any) -> Any:
        if not request.tasks:
            raise invalid("Inference request with no tasks")
        with self.manager.using(request.tasks[0].model_spec) as servable:
            return multi_inference(servable, request)

    def _metadata(self, request: Any) -> Any:
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != SIGNATURE_DEF:
                raise invalid(f"Metadata field {field} is not supported")
        found = get_model_metadata_pb2.SignatureDefMap()
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self.manager.using(request.model_spec) as servable:
            for name, signature in servable.all_signatures.items():
                found.signature_def[name].CopyFrom(signature)
            response.model_spec.name, response.model_spec.version.value = servable.name, servable.version
        response.metadata[SIGNATURE_DEF].Pack(found)
        return response

    def _status(self, request: Any) -> Any:
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in self.manager.status(request.model_spec):
            entry = response.model_version_status.add(version=version.number, state=version.state)
            entry.status.SetInParent()
            if version.error:
                entry.status.error_code = version.error.code.value[0]
                entry.status.error_message = version.error.message
        return response

    def _reload(self, request: Any) -> Any:
        if request.config.WhichOneof("config") != "model_config_list":
            raise invalid(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            )
        self.manager.configure(config.models(request.config))
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response


@contextlib.contextmanager
def counted(model: str, call: str, entrypoint: str) -> Iterator[None]:
    """Counts the request that the block answers.

    Raises:
      ServingError: INTERNAL where anything but a ServingError left the block.
    """
    begin = time.perf_counter()
    status = "INTERNAL"
    try:
        yield
        status = "OK"
    except ServingError as error:
        status = error.code.name
        raise
    except Exception as error:
        log.exception("%s failed", call)
        raise ServingError(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}") from error
    finally:
        metrics.answered(model, call, entrypoint, status, time.perf_counter() - begin)


def _model(request: Any) -> str:
    spec = getattr(request, "model_spec", None)
    return spec.name if spec is not None else ""
