"""What a served model takes and gives, as the server itself says."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from tfopt.data import STRING, TensorSpec
from tfopt.errors import TfoptError
from tfopt.runtime import Signature
from tfopt.serving.loadtest.plan import REST, Target
from tfopt.serving.loadtest.transport import SERVICE, channel, model_path


def read(target: Target) -> Signature:
    """Asks the server for the signature's inputs and outputs (GetModelMetadata, or /metadata over REST).

    Raises:
      TfoptError: nobody answers, or the server has no such model or signature.
    """
    definitions = (_rest if target.protocol == REST else _grpc)(target)
    if target.signature_name not in definitions:
        have = ", ".join(sorted(name for name in definitions if not name.startswith("__")))
        raise TfoptError(
            f"--signature_name={target.signature_name}: model {target.model_name!r} has no such signature; "
            f"it has: {have}"
        )
    found = definitions[target.signature_name]
    return Signature(specs_of(found.inputs), specs_of(found.outputs))


def specs_of(infos: Any) -> dict[str, TensorSpec]:
    """The inputs or outputs of a SignatureDef."""
    import tensorflow as tf

    specs = {}
    for name, info in sorted(infos.items()):
        shape = info.tensor_shape
        dims = None if shape.unknown_rank else tuple(None if d.size < 0 else d.size for d in shape.dim)
        dtype = tf.as_dtype(info.dtype)
        specs[name] = TensorSpec(name, STRING if dtype == tf.string else np.dtype(dtype.as_numpy_dtype), dims)
    return specs


def _grpc(target: Target) -> dict[str, Any]:
    import grpc
    from tensorflow_serving.apis import get_model_metadata_pb2 as protos

    request = protos.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = target.model_name
    if target.model_version is not None:
        request.model_spec.version.value = target.model_version
    with channel(target.server) as opened:
        ask = opened.unary_unary(f"{SERVICE}GetModelMetadata", None, protos.GetModelMetadataResponse.FromString)
        try:
            answer = ask(request.SerializeToString(), timeout=target.timeout_s)
        except grpc.RpcError as error:
            raise TfoptError(
                f"--server={target.server}: GetModelMetadata of model {target.model_name!r} failed: "
                f"{error.code().name}: {error.details()}"
            ) from error
    signatures = protos.SignatureDefMap()
    answer.metadata["signature_def"].Unpack(signatures)
    return dict(signatures.signature_def)


def _rest(target: Target) -> dict[str, Any]:
    from google.protobuf import json_format
    from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

    url = f"http://{target.server}{model_path(target)}/metadata"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=target.timeout_s) as answer:
            facts = json.load(answer)
        found = facts["metadata"]["signature_def"]["signature_def"]
        return {
            name: json_format.ParseDict(definition, SignatureDef(), ignore_unknown_fields=True)
            for name, definition in found.items()
        }
    except urllib.error.HTTPError as error:
        body = error.read()[:300].decode("utf8", "replace")
        raise TfoptError(f"{url}: HTTP {error.code}: {' '.join(body.split())}") from error
    except OSError as error:
        raise TfoptError(f"{url}: no REST server answers there: {error}") from error
    except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise TfoptError(f"{url}: not the metadata of a model: {error}") from error
