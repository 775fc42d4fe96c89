from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tests.tfx.conftest import DIGITS
from tfopt import model
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.tfx.optimization_validator import OptimizationValidator


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digits_optimized, digits_examples) -> dict[str, Path]:
    """Models by name: good, its device files, bad (noise on the weights), broken (no model); and examples."""
    folder = tmp_path_factory.mktemp("made")
    loaded, random = model.load(DIGITS), np.random.default_rng(0)
    for name, value in list(loaded.weights.items()):
        if value.dtype.kind == "f":
            loaded.graph.set_constant(name, value + random.normal(size=value.shape).astype(value.dtype))
    saved_model.save(loaded, folder / "bad")
    (folder / "broken").mkdir()
    (folder / "broken" / "saved_model.pb").write_bytes(b"no model")
    made = {"good": digits_optimized / "serving" / "1", "device": digits_optimized / "device"}
    return made | {"bad": folder / "bad", "broken": folder / "broken", "examples": digits_examples}


BARS = {"metrics": ["accuracy"], "label": "digit", "max_accuracy_drop": 0.05, "max_error": 1e-4}


@pytest.fixture
def validate(local, importer, folders):
    """A function that validates one of `folders` against the original: (blessing, tflite_blessing) as in MLMD."""

    def run(optimized: str = "good", tflite: str | None = "device", bars=BARS, beam=None, split="train"):
        inputs = {
            "model": importer(DIGITS, name="original"),
            "optimized_model": importer(folders[optimized], name="optimized"),
            "examples": importer(folders["examples"], "Examples"),
        }
        if tflite:
            inputs["tflite_model"] = importer(folders[tflite], name="tflite")
        validator = OptimizationValidator(**inputs, bars=bars, eval_split=split)
        local.run(*(channel.producer_component for channel in inputs.values()), validator, beam_args=beam)
        return local.last(validator.outputs["blessing"]), local.last(validator.outputs["tflite_blessing"])

    return run


def test_a_good_model_is_blessed_as_tfx_does_it(validate, folders):
    blessing, tflite = validate()
    assert blessing["blessed"] == 1 and blessing["reasons"] == "" and blessing["samples"] == 40
    assert blessing["current_model"] == str(folders["good"]) and blessing["baseline_model"] == str(DIGITS)
    assert blessing["original_accuracy"] == blessing["serving_accuracy"] == 1.0
    assert json.loads(blessing["serving_accuracy_counts"])["rows"] == 40
    assert blessing["serving_max_error"] <= 1e-5 and blessing["serving_agreement"] == 1.0
    assert {path.name for path in blessing["uri"].iterdir()} == {"BLESSED", "evaluation.json"}
    found = json.loads((blessing["uri"] / "evaluation.json").read_text())
    assert [each["path"] for each in found["artifacts"]] == ["original", "serving", "float32", "int8"]
    assert tflite["blessed"] == 1 and tflite["current_model"] == str(folders["device"])
    assert tflite["int8_accuracy"] >= 0.95 and "serving_accuracy" not in tflite


def test_a_model_below_its_bar_is_not_blessed_and_the_pipeline_goes_on(validate, local):
    blessing, tflite = validate("bad", None, {**BARS, "floors": {"accuracy": 0.9}})
    assert blessing["blessed"] == 0 and tflite["blessed"] == 0
    reasons = blessing["reasons"].split("; ")
    assert [reason.split(" ")[0] for reason in reasons] == ["serving:"] * 3
    assert "accuracy falls by" in reasons[0] and "max_accuracy_drop=0.05" in reasons[0]
    assert "worse than 0.9" in reasons[1] and "more than max_error=0.0001" in reasons[2]
    assert {path.name for path in blessing["uri"].iterdir()} == {"NOT_BLESSED", "evaluation.json"}
    assert tflite["reasons"] == "no tflite_model was given"
    assert local.executions()["OptimizationValidator"] == ["COMPLETE"]


def test_a_tflite_file_that_lost_too_much_keeps_only_itself_back(validate):
    blessing, tflite = validate(bars={"max_error": 1e-4, "tflite_max_error": 1e-4})
    assert blessing["blessed"] == 1 and "original_accuracy" not in blessing
    assert tflite["blessed"] == 0
    assert tflite["reasons"].startswith("int8: the error is") and "tflite_max_error=0.0001" in tflite["reasons"]


def test_what_no_bar_is_for_is_not_blessed(validate):
    blessing, tflite = validate(bars={"max_error": 1e-4})
    assert (blessing["blessed"], tflite["blessed"]) == (1, 0)
    assert tflite["reasons"].startswith("float32, int8: no bar is for it; give tflite_max_error, max_accuracy_drop")


def test_a_model_is_as_good_as_itself(local, importer, folders):
    given, rows = importer(DIGITS), importer(folders["examples"], "Examples")
    validator = OptimizationValidator(given, given, rows, bars={"max_error": 0.0, "min_agreement": 1.0})
    local.run(given.producer_component, rows.producer_component, validator)
    assert local.last(validator.outputs["blessing"])["blessed"] == 1


def test_what_cannot_be_run_is_a_reason(validate):
    blessing, tflite = validate("broken")
    assert blessing["blessed"] == 0 and blessing["reasons"].startswith("serving: ")
    assert tflite["blessed"] == 1


def test_beam_gives_the_same_figures(validate, local):
    (here, _), (beam, _) = validate(split="eval"), validate(split="eval", beam=["--direct_num_workers=1"])
    assert local.executions()["OptimizationValidator"] == ["COMPLETE", "COMPLETE"]
    changing = {"uri", "current_model_id", "baseline_model_id", "name", "is_external", "tfx_version"}
    assert {k: v for k, v in here.items() if k not in changing} == {k: v for k, v in beam.items() if k not in changing}
    assert here["samples"] == 20 and here["blessed"] == 1


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (None, "none is given, so that everything would be blessed"),
        ({"metrics": ["auc"]}, "none is given"),
        ({"max_accuracy_drop": 0.1}, "max_accuracy_drop needs metrics"),
        ({"max_acuracy_drop": 0.1}, "there is no 'max_acuracy_drop'; choose from metrics, label"),
        ({"floors": {"beauty": 1}}, "unknown metric 'beauty'"),
        ({"max_error": "small"}, "'max_error' wants float | None, received 'small'"),
        ("[1]", "wants an object"),
        ("{", "not JSON"),
    ],
)
def test_bars_that_cannot_be_meant_end_in_one_line(bars, message, importer):
    channel = importer(DIGITS)
    with pytest.raises(TfoptError) as raised:
        OptimizationValidator(channel, channel, importer(DIGITS, "Examples"), bars=bars)
    assert str(raised.value).startswith("bars: ") and message in str(raised.value) and "\n" not in str(raised.value)


def test_a_wrong_label_fails_the_component_with_a_line_in_mlmd(validate, local):
    with pytest.raises(Exception, match="wants labels called 'nope'"):
        validate(bars={**BARS, "label": "nope"})
    assert "wants labels called 'nope'" in local.message("OptimizationValidator")
    with pytest.raises(Exception, match="have no split 'test'; they have: eval, train"):
        validate(split="test")
