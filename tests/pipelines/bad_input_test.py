"""Whatever a user can get wrong ends in one line that names it, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tests.forked import Server

MODEL = REPO / "saved_models" / "digits"
pytestmark = pytest.mark.slow  # fifty runs
DATA = "variables/variables.data-00000-of-00001"


def damaged(folder: Path, file: str, keep: int | None) -> Path:
    """A copy of the model in which `file` is cut to `keep` bytes, or missing."""
    shutil.copytree(MODEL, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if keep is not None:
        (folder / file).write_bytes(content[:keep])
    return folder


def recipe(folder: Path, name: str, content: object) -> str:
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"--recipe={path}"


def arrays(folder: Path, name: str, **values: np.ndarray) -> str:
    np.savez(folder / f"{name}.npz", **values)
    return str(folder / f"{name}.npz")


# Case -> what its one line must say. What each is run with is in `commands`.
SAYS = {
    "missing directory": "there is no model at",
    "empty directory": "is not a SavedModel: it has no saved_model.pb",
    "file of no known kind": "is of no known kind",
    "part of a SavedModel": "is a part of a SavedModel: give its directory",
    "truncated graph": "saved_model.pb: cannot be read as a SavedModel",
    "empty graph": "saved_model.pb: holds no MetaGraph",
    "random bytes": "saved_model.pb: cannot be read as a SavedModel",
    "truncated variables": "variables: the checkpoint",
    "empty variables": "variables: the checkpoint",
    "truncated index": "variables: the checkpoint",
    "missing index": "variables: the checkpoint",
    "missing variables": "variables: the checkpoint",
    "damaged Keras file": "is damaged or no Keras file",
    "damaged GraphDef": "is damaged or no GraphDef",
    "unknown signature": "has no signature 'nope'; it has 'serve', 'serving_default'",
    "unknown recipe": "unknown recipe 'nope': choose from",
    "missing recipe file": "nope.json: cannot be read: No such file or directory",
    "recipe is not JSON": "broken.json: is not JSON",
    "recipe is no list": "number.json: expected a list of passes",
    "pass without a name": "recipe nameless, pass 1: expected a pass name",
    "unknown pass": "unknown pass 'fold_everything'; known passes: ",
    "unknown option": "has no option 'size'; its options: max_growth_bytes",
    "wrong type of option": "option 'max_growth_bytes' of fold_constants is int, received 'much'",
    "output below a file": "cannot be written: Not a directory",
    "output is a file": "is a file; name a directory",
    "output in a place that cannot be written": "cannot be written: ",
    "existing output": "holds serving/1 already; pass --overwrite to replace it",
    "data without the input": "wants 'image' float32 (?, 8, 8, 1); received 'picture'",
    "data of a wrong shape": "input 'image' float32 (?, 8, 8, 1) wants rows of shape (8, 8, 1), received (9, 8, 1)",
    "data of a wrong dtype": "input 'image' wants float32, received",
    "data without rows": "holds no rows",
    "missing data": "nope.npz: no such file",
    "random bytes as data": "noise.npz",
    "function that is not there": "python:nope:data",
    "evaluation data without labels": "holds no labels under 'label' (see --label)",
    "labels and inputs of different lengths": "wants as many rows everywhere, received",
    "unknown tflite name": "--tflite: unknown name 'int7'; choose from ",
    "int8 without data": "--tflite=int8 needs --representative_data",
    "recipe for int8 without data": "--representative_data",
    "training for int8 without data": "--representative_data",
    "NaN in calibration data": "input 'image' holds NaN or infinity in row 2",
    "drop without evaluation data": "--max_accuracy_drop needs --eval_data",
    "unknown metric": "--metric: unknown 'nope'; choose from ",
    "unknown output": "no output 'nope'",
    "unknown flag": "Unknown command line flag 'recipes'",
    "flag without a value": "Missing value for flag --recipe",
    "not a number": "--seed",
    "version zero": "--version",
    "argument that is no flag": "unexpected argument 'saved_models'",
    "no model": "--model",
    "inputs for a SavedModel": "--inputs and --outputs go with a frozen GraphDef .pb only",
}


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """Case -> flags."""
    model, output = f"--model={MODEL}", f"--output_dir={out}"
    image = np.zeros((4, 8, 8, 1), np.float32)
    with_nan = image.copy()
    with_nan[2, 3, 3] = np.nan
    noise = np.random.default_rng(0).bytes(5000)
    (folder / "noise").mkdir()
    (folder / "noise" / "saved_model.pb").write_bytes(noise)
    for suffix in ("h5", "pb", "npz", "onnx"):
        (folder / f"noise.{suffix}").write_bytes(noise)
    (folder / "empty").mkdir()
    (folder / "existing" / "serving" / "1").mkdir(parents=True)

    def of(path: Path) -> list[str]:
        return [f"--model={path}", output]

    def cut(name: str, file: str, keep: int | None) -> list[str]:
        return of(damaged(folder / name, file, keep))

    def with_recipe(name: str, content: object) -> list[str]:
        return [model, output, recipe(folder, name, content)]

    def with_data(name: str, **values: np.ndarray) -> list[str]:
        return [model, output, f"--representative_data={arrays(folder, name, **values)}"]

    def evaluated(*flags: str, **values: np.ndarray) -> list[str]:
        name = f"eval{len(list(folder.iterdir()))}"
        return [model, output, "--tflite=", f"--eval_data={arrays(folder, name, **values)}", *flags]

    return {
        "missing directory": of(folder / "nope"),
        "empty directory": of(folder / "empty"),
        "file of no known kind": of(folder / "noise.onnx"),
        "part of a SavedModel": of(MODEL / "saved_model.pb"),
        "truncated graph": cut("graph", "saved_model.pb", 70_001),
        "empty graph": cut("no_graph", "saved_model.pb", 0),
        "random bytes": of(folder / "noise"),
        "truncated variables": cut("data", DATA, 100_000),
        "empty variables": cut("no_data", DATA, 0),
        "truncated index": cut("index", "variables/variables.index", 500),
        "missing index": cut("no_index", "variables/variables.index", None),
        "missing variables": cut("lost_data", DATA, None),
        "damaged Keras file": of(folder / "noise.h5"),
        "damaged GraphDef": [*of(folder / "noise.pb"), "--inputs=x", "--outputs=y"],
        "unknown signature": [model, output, "--signatures=nope"],
        "unknown recipe": [model, output, "--recipe=nope"],
        "missing recipe file": [model, output, f"--recipe={folder / 'nope.json'}"],
        "recipe is not JSON": with_recipe("broken", "[prune_graph"),
        "recipe is no list": with_recipe("number", 7),
        "pass without a name": with_recipe("nameless", [{"max_growth_bytes": 1}]),
        "unknown pass": with_recipe("unknown", ["fold_everything"]),
        "unknown option": with_recipe("option", [{"pass": "fold_constants", "size": 1}]),
        "wrong type of option": with_recipe("type", [{"pass": "fold_constants", "max_growth_bytes": "much"}]),
        "output below a file": [model, f"--output_dir={folder / 'noise.h5' / 'out'}"],
        "output is a file": [model, f"--output_dir={folder / 'noise.h5'}"],
        "output in a place that cannot be written": [model, "--output_dir=/proc/tfopt/out"],
        "existing output": [model, f"--output_dir={folder / 'existing'}"],
        "data without the input": with_data("name", picture=image),
        "data of a wrong shape": with_data("shape", image=np.zeros((4, 9, 8, 1), np.float32)),
        "data of a wrong dtype": with_data("dtype", image=np.full((4, 8, 8, 1), "text")),
        "data without rows": with_data("rows", image=image[:0]),
        "missing data": [model, output, f"--representative_data={folder / 'nope.npz'}"],
        "random bytes as data": [model, output, f"--representative_data={folder / 'noise.npz'}"],
        "function that is not there": [model, output, "--representative_data=python:nope:data"],
        "evaluation data without labels": evaluated(image=image),
        "labels and inputs of different lengths": evaluated(image=image, label=np.zeros(3, np.int64)),
        "unknown tflite name": [model, output, "--tflite=int7"],
        "int8 without data": [model, output, "--tflite=int8"],
        "recipe for int8 without data": [model, output, "--recipe=device_int8"],
        "training for int8 without data": [model, output, "--recipe=qat_int8"],
        "NaN in calibration data": [*with_data("nan", image=with_nan), "--recipe=device_int8"],
        "drop without evaluation data": [model, output, "--max_accuracy_drop=0.1"],
        "unknown metric": evaluated("--metric=nope", image=image, label=np.zeros(4, np.int64)),
        "unknown output": evaluated("--eval_output=nope", image=image, label=np.zeros(4, np.int64)),
        "unknown flag": [model, output, "--recipes=lossless"],
        "flag without a value": [model, output, "--recipe"],
        "not a number": [model, output, "--seed=many"],
        "version zero": [model, output, "--version=0"],
        "argument that is no flag": [model, output, "saved_models"],
        "no model": [output],
        "inputs for a SavedModel": [model, output, "--inputs=image"],
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Case -> how it ended, what was left of its own folder."""
    folder = tmp_path_factory.mktemp("inputs")
    names, flags = zip(*commands(folder, Path("OUT")).items(), strict=True)
    outs = [tmp_path_factory.mktemp("case") for _ in names]
    cases = [
        [flag.replace("OUT", str(out / "new" / "out")) for flag in case] for case, out in zip(flags, outs, strict=True)
    ]
    before = sorted(folder.rglob("*"))
    with Server("pipelines.optimize", "tfopt.optimize") as server:
        results = server.run_all(cases, tmp_path_factory.mktemp("log"), timeout=120)
    assert sorted(folder.rglob("*")) == before, "something was left beside an input"
    return {name: (result, list(out.iterdir())) for name, result, out in zip(names, results, outs, strict=True)}


@pytest.mark.parametrize("case", SAYS)
def test_one_line_and_nothing_left(ended, case):
    result, left = ended[case]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.code == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and len(lines) == 1
    assert SAYS[case] in lines[0] and len(lines[0]) < 500
    assert left == [] and not result.stdout.strip()


def test_every_case_says_something(ended):
    assert ended.keys() == SAYS.keys()


class Elu(tf.Module):
    """A layer whose activation has no integer kernel."""

    @tf.function(input_signature=[tf.TensorSpec((None, 16), tf.float32, name="x")])
    def score(self, x):
        kernel = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
        return {"y": tf.nn.elu(x @ kernel) @ kernel.T}


def test_what_cannot_be_met_is_rejected_in_the_report(tmp_path):
    """Exit code 1: the files are not there, nothing else is left, and the report says what stood in the way."""
    elu = Elu()
    tf.saved_model.save(elu, str(tmp_path / "elu"), signatures={"serving_default": elu.score})
    random = np.random.default_rng(1)
    rows = arrays(tmp_path, "rows", x=random.normal(size=(8, 16)).astype(np.float32))
    images = random.uniform(size=(8, 8, 8, 1)).astype(np.float32)
    seen = arrays(tmp_path, "seen", image=images)
    judged = arrays(tmp_path, "judged", image=images, label=np.zeros(8, np.int64))
    nan = images.copy()
    nan[2, 3, 3] = np.nan
    broken = arrays(tmp_path, "broken", image=nan)
    model, quick = shutil.copytree(MODEL, tmp_path / "digits"), "--nomeasure_latency"

    def int8(source: str) -> list[str]:
        return ["--recipe=device_int8", f"--representative_data={source}"]

    bar = [f"--eval_data={judged}", "--max_accuracy_drop=-1"]
    cases = {
        "ELU": [f"--model={tmp_path / 'elu'}", *int8(rows), "--all_integer"],
        "drop": [f"--model={model}", *int8(seen), *bar],
        "NaN": [f"--model={model}", "--tflite=int8", f"--representative_data={broken}"],
    }
    before = sorted(tmp_path.rglob("*"))
    with Server("pipelines.optimize", "tfopt.optimize") as server:
        flags = [[*case, quick, f"--output_dir={tmp_path / 'out' / name}"] for name, case in cases.items()]
        results = dict(zip(cases, server.run_all(flags, tmp_path / "log", timeout=300), strict=True))
    for name, result in results.items():
        out = tmp_path / "out" / name
        assert result.code == 1 and "Traceback" not in result.stderr, (name, result.stderr[-2000:])
        report = json.loads((out / "report.json").read_text())
        rejected = {each["name"]: each["rejected"] for each in report["artifacts"] if each["rejected"]}
        assert {"ELU": "no integer kernel for 1 x ELU", "drop": "accuracy falls by 0", "NaN": "NaN"}[name] in rejected[
            "int8"
        ]
        kept = {"report.json", "report.html", "serving"} - rejected.keys()
        assert {path.name for path in out.iterdir()} == kept
    left = {path for path in tmp_path.rglob("*") if not {"out", "log"} & set(path.relative_to(tmp_path).parts)}
    assert sorted(left) == before


def test_real_models(shared, tmp_path):
    models = shared / "models"
    wanted = {
        models
        / "tf-serving-testdata"
        / "bad_half_plus_two"
        / "00000123": "is not a SavedModel: it has no saved_model.pb",
        models / "tfx-unsupported-op" / "benchmark_trained": "BoostedTreesBucketize",
        models / "basic-pitch" / "nmp.tflite": "is already converted",
        models / "tf-serving-testdata" / "saved_model_half_plus_two_2_versions": "00000124",
    }
    with Server("pipelines.optimize", "tfopt.optimize") as server:
        cases = [[f"--model={path}", f"--output_dir={tmp_path / str(i)}"] for i, path in enumerate(wanted)]
        results = server.run_all(cases, tmp_path / "log")
    for (path, message), result in zip(wanted.items(), results, strict=True):
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.code == 2 and len(lines) == 1 and message in lines[0], (path, result.stderr[-2000:])
    assert {path.name for path in tmp_path.iterdir()} == {"log"}


@pytest.mark.parametrize("how", ["module", "path"])
def test_the_command_itself(how, tmp_path):
    start = {"module": ["-m", "pipelines.optimize"], "path": ["pipelines/optimize.py"]}[how]
    model = damaged(tmp_path / "model", "saved_model.pb", 1000)
    done = subprocess.run(
        [sys.executable, *start, f"--model={model}", f"--output_dir={tmp_path / 'out'}"],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and str(model / "saved_model.pb") in line
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
