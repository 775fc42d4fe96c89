"""What the documentation shows must be so."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
import tensorflow as tf

from tests.conftest import REPO
from tfopt import passes, recipe, recovery
from tfopt.model import load
from tfopt.rewrite import Log

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPO / "docs" / name).read_text(), re.DOTALL)


def test_recipes_page_names_every_recipe_and_pass():
    text = (REPO / "docs" / "recipes.md").read_text()
    recipes, techniques = text.split("## The passes")
    lossless = recipe.NAMED["lossless"]["passes"]
    for name, named in recipe.NAMED.items():
        steps = [step if isinstance(step, str) else step["pass"] for step in named["passes"]]
        if steps[: len(lossless)] == lossless and len(steps) > len(lossless):
            steps[: len(lossless)] = ["the lossless ones"]
        (row,) = re.findall(rf"^\| `{name}`.*$", recipes, re.MULTILINE)
        if steps:
            assert row.split("|")[2].strip() == ", ".join(steps)
    (training,) = re.findall(r"have these options\ntoo: (.*?)\n\n", text, re.DOTALL)
    assert dict(re.findall(r"`(\w+)`\s\(([\w.-]+)", training)) == {o: str(v) for o, v in recovery.OPTIONS.items()}
    for name in passes.NAMES:
        shared = recovery.OPTIONS.keys() <= passes.get(name).options.keys()
        (row,) = re.findall(rf"^\| `{name}` \|.*$", techniques, re.MULTILINE)
        own = {o: v for o, v in passes.get(name).options.items() if not shared or recovery.OPTIONS.get(o) != v}
        assert re.findall(r"`(\w+)` \(([\w.*-]*)\)", row) == [(option, str(default)) for option, default in own.items()]


def test_example_recipe_is_legal():
    (example,) = blocks("recipes.md", "json")
    assert recipe.parse(json.loads(example)["passes"], "example").steps


def test_example_pass_runs(tmp_path, monkeypatch):
    rules, technique = blocks("adding_a_pass.md", "python")
    negations = types.ModuleType("tfopt.rules.negations")
    exec(rules, negations.__dict__)
    monkeypatch.setitem(sys.modules, "tfopt.rules.negations", negations)
    monkeypatch.setattr("tfopt.rules.negations", negations, raising=False)
    module = types.ModuleType("drop_negations")
    exec(technique, module.__dict__)

    net = tf.Module()
    net.call = tf.function(
        lambda x: {"y": tf.negative(tf.negative(x)) * 2.0}, input_signature=[tf.TensorSpec((None, 2), name="x")]
    )
    tf.saved_model.save(net, str(tmp_path), signatures={"serving_default": net.call})
    model, log = load(tmp_path), Log()
    assert sum(node.op == "Neg" for node in model.graph.nodes.values()) == 2
    module.PASS.run(model, log)
    assert log.applied == {"double negation": 1}
    assert sum(node.op == "Neg" for node in model.graph.nodes.values()) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tfopt|pipelines|tools|tests|docs|benchmarks|saved_models)/[\w./]*)`", text):
        if "negations" not in path:  # the file of the example
            assert (REPO / path).exists(), path
