"""RewriterAdapter: tfopt behind TFX's rewriting interface, for the run_fn of an existing Trainer.

    from tfx.components.trainer.rewriting import rewriter
    from tfopt.tfx.rewriter import RewriterAdapter

    def run_fn(fn_args):
        ...
        model.export(exported)
        RewriterAdapter(tflite="int8", representative_data=fn_args.train_files[0]).perform_rewrite(
            rewriter.ModelDescription(rewriter.ModelType.SAVED_MODEL, exported),
            rewriter.ModelDescription(rewriter.ModelType.TFLITE_MODEL, fn_args.serving_model_dir),
        )

`rewriter_factory.create_rewriter("RewriterAdapter", ...)` makes one too, once this module is imported.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tfx.components.trainer.rewriting.rewriter import BaseRewriter, ModelDescription, ModelType
from tfx.dsl.io import fileio
from tfx.utils import io_utils

from tfopt import runtime
from tfopt.errors import TfoptError
from tfopt.optimize import Options, optimize
from tfopt.tfx import artifacts

_REPORT = "tfopt_report.json"


class RewriterAdapter(BaseRewriter):
    """Rewrites a SavedModel into an optimized SavedModel, or into a TFLite file."""

    def __init__(
        self,
        name: str = "tfopt",
        recipe: str | list | Mapping[str, Any] = "lossless",
        tflite: str = "float32",
        filename: str = "tflite",
        **options: Any,
    ):
        """Checks the options.

        Args:
          name: of this rewriter in messages of TFX.
          recipe: the name of one, JSON text, or what the JSON stands for.
          tflite: which TFLite file to make, where one is wanted: float32, float16, dynamic_int8, int8, ...
          filename: what to call it; TFX's own TFLiteRewriter says `tflite`.
          **options: fields of `tfopt.optimize.Options`: representative_data, eval_data, label, max_accuracy_drop, ...

        Raises:
          ValueError: an unknown field.
        """
        self._name, self._tflite, self._filename = name, tflite, filename
        with _as_value_error():
            known = {field.name for field in dataclasses.fields(Options)}
            if unknown := sorted(options.keys() - known):
                raise TfoptError(f"no option {unknown[0]!r}; choose from {', '.join(sorted(known))}")
            text = recipe if isinstance(recipe, str) else json.dumps(recipe)
            self._options = Options(recipe=text, command=f"tfopt.tfx.rewriter.RewriterAdapter {name}", **options)

    @property
    def name(self) -> str:
        """What TFX calls it in messages."""
        return self._name

    def _pre_rewrite_validate(self, original_model: ModelDescription) -> None:
        if original_model.model_type not in (ModelType.SAVED_MODEL, ModelType.ANY_MODEL):
            raise ValueError(f"wants a SavedModel, received a {original_model.model_type.name}")
        if not fileio.exists(posixpath.join(_text(original_model.path), "saved_model.pb")):
            raise ValueError(f"{_text(original_model.path)}: no saved_model.pb in it")

    def _rewrite(self, original_model: ModelDescription, rewritten_model: ModelDescription) -> None:
        kind, target = rewritten_model.model_type, _text(rewritten_model.path)
        if kind not in (ModelType.SAVED_MODEL, ModelType.TFLITE_MODEL, ModelType.ANY_MODEL):
            raise ValueError(f"makes a SavedModel or a TFLite model, not a {kind.name}")
        lite = kind is ModelType.TFLITE_MODEL
        with artifacts.scratch() as folder, _as_value_error():
            model = artifacts.local(_text(original_model.path), folder)
            made = Path(folder) / "made"
            options = dataclasses.replace(self._options, tflite=(self._tflite,) if lite else ())
            result = optimize(model, made, options)
            wanted = self._tflite if lite else "serving"
            reasons = [f"{a.name}: {a.rejected}" for a in result.report.artifacts if a.name == wanted and a.rejected]
            if reasons:
                raise TfoptError("; ".join(reasons))
            if lite:
                made_file = made / "device" / f"{self._tflite}.tflite"
                io_utils.copy_file(str(made_file), posixpath.join(target, self._filename), overwrite=True)
            else:
                io_utils.copy_dir(str(made / "serving" / str(options.version)), target)
            extra = posixpath.join(target, "assets.extra")
            io_utils.copy_file(str(made / "report.json"), posixpath.join(extra, _REPORT), overwrite=True)

    def _post_rewrite_validate(self, rewritten_model: ModelDescription) -> None:
        target = _text(rewritten_model.path)
        lite = rewritten_model.model_type is ModelType.TFLITE_MODEL
        path = posixpath.join(target, self._filename) if lite else target
        with artifacts.scratch() as folder, _as_value_error(), runtime.open(artifacts.local(path, folder)) as program:
            if not program.signatures:
                raise ValueError(f"{path}: has no signature")


@contextmanager
def _as_value_error() -> Iterator[None]:
    """ValueError is what TFX's rewriting interface expects, and frames with the rewriter's name."""
    try:
        yield
    except TfoptError as error:
        raise ValueError(str(error)) from error


def _text(path: str | bytes) -> str:
    return path.decode() if isinstance(path, bytes) else path
