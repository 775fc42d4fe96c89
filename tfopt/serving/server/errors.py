"""What a request is answered when it fails: a status code and a message, those that TensorFlow Serving gives."""

from __future__ import annotations

import grpc

# By tensorflow::error::Code, which gRPC took its numbers from.
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(Exception):
    """A request that fails: `code` is a grpc.StatusCode, `message` what the client reads."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


def invalid(message: str) -> ServingError:
    """INVALID_ARGUMENT: the request is wrong, and would be at any time."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def not_found(message: str) -> ServingError:
    """NOT_FOUND: no such model, version or label is being served."""
    return ServingError(grpc.StatusCode.NOT_FOUND, message)


def from_tensorflow(error: Exception) -> ServingError:
    """A failure of a session run: the code of TensorFlow's error, INVALID_ARGUMENT for what Python could not feed."""
    number = getattr(error, "error_code", None)
    if number is None:
        code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, TypeError | ValueError) else None
        return ServingError(code or grpc.StatusCode.INTERNAL, " ".join(str(error).split()))
    return ServingError(_CODES.get(number, grpc.StatusCode.UNKNOWN), str(getattr(error, "message", error)))
