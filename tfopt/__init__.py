"""tfopt makes trained TensorFlow models smaller and faster, and proves it.

    from tfopt.optimize import Options, optimize

    result = optimize("saved_models/digits", "/tmp/digits", Options(tflite=("float32",)))
    print(result.report.table())

Importing this package imports no TensorFlow; the modules that need it do.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Finds TFX's type of our report, which a container of Kubeflow looks for in a package of one name."""
    if name != "OptimizationReport":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("tfopt.tfx.artifacts").OptimizationReport
