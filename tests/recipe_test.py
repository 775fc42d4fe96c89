from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO
from tfopt import passes, recipe
from tfopt.errors import TfoptError


@pytest.mark.parametrize("name", recipe.NAMED)
def test_named_recipes_are_legal_and_read_again_from_their_own_json(name, tmp_path):
    read = recipe.read(name)
    assert read.name == name and len(read.steps) == len(recipe.NAMED[name]["passes"])
    (tmp_path / "again.json").write_text(json.dumps(read.to_dict()))
    assert recipe.read(str(tmp_path / "again.json")) == read


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ('["prune_graph"]', (("prune_graph", {}),)),
        ('{"passes": [{"pass": "prune_graph"}, "prune_graph"]}', (("prune_graph", {}), ("prune_graph", {}))),
        ('[{"pass": "fold_constants", "max_growth_bytes": 7}]', (("fold_constants", {"max_growth_bytes": 7}),)),
        ("[]", ()),
    ],
)
def test_both_forms_are_read(text, steps, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    read = recipe.read(str(tmp_path / "mine.json"))
    assert read.steps == steps and read.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "mine.json: is not JSON"),
        ('"prune_graph"', "expected a list of passes, or an object with 'name' and 'passes'"),
        ('{"name": "x"}', "expected a list of passes"),
        ('{"passes": [], "extra": 1}', "expected a list of passes"),
        ('["prune"]', "unknown pass 'prune'; known passes: prune_graph, "),
        ("[7]", "pass 1: expected a pass name, or an object with 'pass', received 7"),
        ('["prune_graph", {"name": "x"}]', "pass 2: expected a pass name"),
        ('[{"pass": 3}]', "pass 1: expected a pass name"),
        ('[{"pass": "prune_graph", "deep": true}]', "prune_graph has no option 'deep'; its options: none"),
        ('[{"pass": "fold_constants", "grow": 1}]', "has no option 'grow'; its options: max_growth_bytes"),
        ('[{"pass": "fold_constants", "max_growth_bytes": "1"}]', "of fold_constants is int, received '1'"),
        ('[{"pass": "fold_constants", "max_growth_bytes": true}]', "is int, received True"),
    ],
)  # fmt: skip
def test_what_is_wrong_ends_in_one_line(text, message, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(TfoptError) as raised:
        recipe.read(str(tmp_path / "mine.json"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_json_text_is_what_its_file_is(tmp_path):
    text = '{"name": "mine", "passes": ["prune_graph"], "tflite": ["float16"]}'
    (tmp_path / "other.json").write_text(text)
    assert recipe.read(text) == recipe.read(str(tmp_path / "other.json")) and recipe.read(text).name == "mine"
    assert recipe.read('["prune_graph"]').name == "custom"
    with pytest.raises(TfoptError, match="is not JSON"):
        recipe.read('["prune_graph"')


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(TfoptError, match=r"unknown recipe 'losless': choose from none, lossless, .* or give a .json"):
        recipe.read("losless")
    with pytest.raises(TfoptError, match="cannot be read: No such file"):
        recipe.read(str(tmp_path / "none.json"))
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(TfoptError, match="cannot be read: Is a directory"):
        recipe.read(str(tmp_path / "dir.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TfoptError, match="is not JSON"):
        recipe.read(str(tmp_path / "binary.json"))


def test_a_pass_that_needs_another_before_it():
    with pytest.raises(TfoptError, match="pass 2: fold_affine needs fold_constants before it"):
        recipe.parse(["prune_graph", "fold_affine", "fold_constants"], "mine")
    assert len(recipe.parse(["prune_graph", "fold_constants", "fold_affine"], "mine").steps) == 3


_BEFORE = ["prune_graph", "fold_constants", "fold_affine"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            ["quantize", "fold_constants"],
            "pass 5: fold_constants would undo the ranges that quantize (pass 4) made; put fold_constants",
        ),
        (["quantize", "merge_duplicates"], None),
        (["train_quantized", "quantize"], "quantize would undo the ranges that train_quantized (pass 4) made"),
    ],
)
def test_an_order_that_undoes_an_earlier_gain_is_refused_with_the_one_that_works(steps, message):
    if message is None:
        assert len(recipe.parse(_BEFORE + steps, "mine").steps) == 3 + len(steps)
        return
    with pytest.raises(TfoptError) as raised:
        recipe.parse(_BEFORE + steps, "mine")
    assert message in str(raised.value)


@pytest.mark.parametrize("name", passes.NAMES)
def test_what_a_pass_makes_and_keeps_is_known(name):
    chosen = passes.get(name)
    assert set(chosen.makes) | set(chosen.keeps) <= set(passes.INVARIANTS)


def test_options_are_changed_by_name():
    read = recipe.read("qat_int4")
    changed = recipe.override(read, ["train_quantized.epochs=2", "train_quantized.calibrator=mse"])
    options = dict(changed.steps)["train_quantized"]
    assert options == {**dict(read.steps)["train_quantized"], "epochs": 2, "calibrator": "mse"}
    assert changed.tflite == read.tflite and recipe.override(read, []) == read
    twice = recipe.override(recipe.read("lossless"), ["fold_constants.max_growth_bytes=0"])
    assert [o for name, o in twice.steps if name == "fold_constants"] == [{"max_growth_bytes": 0}] * 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=2", "--set=epochs=2: expected pass.option=value"),
        ("train_quantized.epochs", "expected pass.option=value"),
        ("train_quantised.epochs=2", "recipe qat_int8 has no pass 'train_quantised'; its passes: prune_graph, "),
        ("train_quantized.epoch=2", "train_quantized has no option 'epoch'"),
        ("train_quantized.epochs=two", "option 'epochs' of train_quantized is int, received 'two'"),
        ("train_quantized.epochs=2.5", "option 'epochs' of train_quantized is int, received 2.5"),
    ],
)
def test_changes_that_make_no_sense_end_in_one_line(setting, message):
    with pytest.raises(TfoptError) as raised:
        recipe.override(recipe.read("qat_int8"), [setting])
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", passes.NAMES)
def test_every_pass_is_where_its_name_says(name):
    assert passes.get(name).name == name


def test_importing_tfopt_and_asking_for_help_load_no_tensorflow():
    code = (
        "import runpy, sys, tfopt, tfopt.errors, tfopt.recipe, tfopt.report, tfopt.data\n"
        "sys.argv = ['tfopt-optimize', '--help']\n"
        "try:\n    runpy.run_module('pipelines.optimize', run_name='__main__')\n"
        "finally:\n    print('loaded', sorted({'tensorflow', 'keras', 'tf_keras'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert "--max_accuracy_drop" in run.stdout and run.stdout.rstrip().endswith("loaded []"), run.stderr
