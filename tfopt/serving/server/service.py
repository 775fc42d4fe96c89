"""What the server answers, whatever the protocol: from a request message to an answer message."""

from __future__ import annotations

from typing import Any

from tfopt.serving.server.manager import Manager
from tfopt.serving.server.predict import predict


class Service:
    """The calls of PredictionService and ModelService as plain functions; they block, and any thread may call them.

    Each raises ServingError where the request fails.
    """

    def __init__(self, manager: Manager, as_content: bool = False):
        self.manager = manager
        self._as_content = as_content

    def predict(self, request: Any) -> Any:
        """PredictRequest to PredictResponse."""
        with self.manager.using(request.model_spec) as servable:
            return predict(servable, request, self._as_content)
