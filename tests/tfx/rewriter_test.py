from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tfx.components.trainer.rewriting import rewriter, rewriter_factory

from tests.tfx.conftest import DIGITS
from tfopt import runtime
from tfopt.report import Report
from tfopt.tfx.rewriter import RewriterAdapter


def describe(kind: str, path) -> rewriter.ModelDescription:
    return rewriter.ModelDescription(rewriter.ModelType[kind], str(path))


def outputs(path) -> np.ndarray:
    with runtime.open(path) as program:
        (name,), (spec,) = zip(*program.signatures["serving_default"].inputs.items(), strict=True)
        rows = np.random.default_rng(0).random((4, *spec.shape[1:])).astype(np.float32)
        (scores,) = program.run("serving_default", {name: rows}).values()
    return scores


@pytest.mark.parametrize(
    ("kind", "file"), [("SAVED_MODEL", "."), ("ANY_MODEL", "."), ("TFLITE_MODEL", "tflite")], ids=lambda value: value
)
def test_models_are_rewritten_as_tfx_asks(kind, file, tmp_path):
    adapter = rewriter_factory.create_rewriter("RewriterAdapter", name="mine", measure_latency=False)
    assert isinstance(adapter, RewriterAdapter) and adapter.name == "mine"
    adapter.perform_rewrite(describe("SAVED_MODEL", DIGITS), describe(kind, tmp_path / "out"))
    np.testing.assert_allclose(outputs(tmp_path / "out" / file), outputs(DIGITS), rtol=1e-4, atol=1e-5)
    report = Report.from_json((tmp_path / "out" / "assets.extra" / "tfopt_report.json").read_text())
    assert [a.name for a in report.artifacts][1:] == (["serving"] if file == "." else ["serving", "float32"])


def test_what_is_wrong_is_the_value_error_that_tfx_expects(tmp_path):
    good = describe("SAVED_MODEL", DIGITS)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"mine failed to perform pre-rewrite validation.* wants a SavedModel"):
        RewriterAdapter("mine").perform_rewrite(describe("TFLITE_MODEL", DIGITS), describe("SAVED_MODEL", out))
    with pytest.raises(ValueError, match=r"no saved_model.pb in it"):
        RewriterAdapter("mine").perform_rewrite(describe("SAVED_MODEL", tmp_path), describe("SAVED_MODEL", out))
    with pytest.raises(ValueError, match="not a TFJS_MODEL"):
        RewriterAdapter("mine").perform_rewrite(good, describe("TFJS_MODEL", out))
    with pytest.raises(ValueError, match=r"mine failed to rewrite model.*int8 needs --representative_data"):
        RewriterAdapter("mine", tflite="int8").perform_rewrite(good, describe("TFLITE_MODEL", out))
    with pytest.raises(ValueError, match="no option 'metrics'; choose from"):
        RewriterAdapter("mine", metrics="auc")
    assert not out.exists()
