"""Reports: exact round trips, clear refusals, and drawings that hold what was measured."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfopt import report_words as words
from tfopt.errors import TfoptError
from tfopt.report import Artifact, Metric, Refusal, Report, Step, group_refusals
from tfopt.report_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Point, ranked, scatter

VOID = {"meta", "br", "circle", "line", "link", "img", "input", "hr"}


def sample() -> Report:
    """A keyword spotting model that went to TensorFlow Serving and to devices; one artifact was rejected."""
    steps = [
        Step(
            "prune_graph",
            {},
            412,
            198,
            118_400,
            92_736,
            {"identity": 120, "read_variable": 46, "dropout": 9, "save_restore": 39},
            [],
            0.0,
            "applied",
            [],
            0.41,
            "Removes what serving does not need: nodes that reach no output, pass-through and training-only nodes.",
        ),
        Step(
            "fold_constants",
            {"max_bytes": 65536},
            198,
            131,
            92_736,
            92_736,
            {"constant": 67},
            [
                Refusal("constant", "fill/Fill", "the result, 16.0 MB, is larger than max_bytes, 65.5 kB"),
                Refusal("constant", "tile/Tile", "the result, 16.0 MB, is larger than max_bytes, 65.5 kB"),
            ],
            1.2e-07,
            "applied",
            [],
            0.63,
            "Computes what does not depend on the inputs once, now.",
        ),
        Step("merge_duplicates", {}, 131, 131, 92_736, 92_736, {}, [], None, "no effect", [], 0.02),
        Step(
            "fold_affine",
            {},
            131,
            57,
            92_736,
            90_432,
            {"backward": 9, "through Reshape": 2, "forward": 1},
            [
                Refusal("affine", f"block_{i}/add", "the ReLU in between does not commute with a shift")
                for i in range(14)
            ]
            + [
                Refusal(
                    "affine",
                    "stem/FusedBatchNormV3",
                    "is_training=True: it normalises by the statistics of the batch, which is probably a bug",
                )
            ],
            2.4e-07,
            "applied",
            ["1 batch norm serves in training mode: its outputs depend on the other rows of the batch."],
            1.74,
            "Moves batch norms, scales and shifts into the weights of their neighbours.",
        ),
    ]
    rejection = "accuracy 87.40% is 4.00 points below the original's 91.40%; --max_accuracy_drop allows 0.5"
    # fmt: off
    measured = [  # bytes, gzip, FLOPs, errors (absolute, relative), agreement, accuracy, p50, p95, memory
        ("original", "saved_model", 472_310, 214_022, 5_543_000, None, None, None, 0.914, 1.31, 1.74, 312_000_000, ""),
        ("serving", "saved_model", 104_112, 86_130, 5_310_000, 3.1e-6, 2.6e-7, 1.0, 0.914, 0.83, 1.12, 271_000_000, ""),
        ("float32", "tflite", 95_204, 84_420, 5_310_000, 4.4e-6, 3.7e-7, 1.0, 0.914, 0.29, 0.33, 9_100_000, ""),
        ("float16", "tflite", 53_612, 45_390, 5_310_000, 8.8e-3, 7.3e-4, 1.0, 0.914, 0.30, 0.34, 9_400_000, ""),
        ("int8", "tflite", 49_480, 34_802, 5_310_000, 0.61, 0.051, 0.984, 0.91, 0.17, 0.19, 7_200_000, ""),
        ("dynamic_int8", "tflite", 42_112, 36_440, 5_310_000, 1.9, 0.16, 0.93, 0.874, 0.26, 0.31, 8_000_000, rejection),
    ]
    # fmt: on
    artifacts = [
        Artifact(
            name,
            kind,
            f"out/{name}",
            raw,
            zipped,
            22_604,
            flops,
            e_abs,
            e_rel,
            same,
            Metric("accuracy", accuracy, 500),
            p50,
            p95,
            memory,
            rejected,
        )
        for name, kind, raw, zipped, flops, e_abs, e_rel, same, accuracy, p50, p95, memory, rejected in measured
    ]
    return Report(
        created="2026-11-22T12:50:00+00:00",
        command="tfopt-optimize --model=models/kws --output_dir=out --eval_data=kws.npz --max_accuracy_drop=0.005",
        seed=7,
        environment={
            "tfopt": "0.1.0",
            "tensorflow": "2.21.0",
            "python": "3.11.9",
            "cpu": "x86-64, 2 cores",
            "threads": 2,
        },
        model={
            "path": "models/kws",
            "origin": "Keras 2 SavedModel",
            "signatures": [
                {
                    "name": "serving_default",
                    "inputs": [{"name": "input_1", "dtype": "float32", "shape": [None, 49, 10, 1]}],
                    "outputs": [{"name": "dense", "dtype": "float32", "shape": [None, 12]}],
                }
            ],
            "nodes": 412,
            "parameters": 22_604,
            "state": [],
            "tables": [],
            "assets": [],
        },
        recipe={"name": "lossless", "passes": ["prune_graph", "fold_constants", "merge_duplicates", "fold_affine"]},
        verify="outputs before and after every pass, on 16 rows of kws.npz; bound 1e-4 of the output's scale",
        steps=steps,
        artifacts=artifacts,
        warnings=["stem/FusedBatchNormV3 serves in training mode: probably exported with training=True"],
        data={"representative": "kws.npz, 100 rows", "evaluation": "kws.npz, 500 rows"},
    )


class Page(html.parser.HTMLParser):
    """Checks that tags match, and collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def without_measurements() -> Report:
    """The sample as a run without labels, timing and original writes it."""
    report = sample()
    report.artifacts = [
        dataclasses.replace(a, accuracy=None, latency_ms_p50=None, latency_ms_p95=None, peak_memory_bytes=None)
        for a in report.artifacts[1:]
    ]
    return report


def hard() -> Report:
    """Long names, large numbers, failed artifacts, differing sample counts, 400 refusals, text that is markup."""
    report = sample()
    report.artifacts[1].name = "an_artifact_with_a_name_that_never_ends"
    for i, artifact in enumerate(report.artifacts):
        artifact.bytes, artifact.gzip_bytes = 999_499_999 * 10**i, 998_499_999 * 10**i
        artifact.parameters, artifact.flops = 123_456_789_012, 987_654_321_098_765
        artifact.accuracy = Metric("accuracy", 1.0, 123_456 + i)
        artifact.latency_ms_p50, artifact.latency_ms_p95, artifact.peak_memory_bytes = 123_456.7, 234_567.8, 10**12
    report.artifacts.append(Artifact("int4", "tflite", rejected="no kernel for <int4> " + "and more of it " * 20))
    report.artifacts.append(Artifact("broken", "tflite", max_rel_error=math.inf, bytes=5, latency_ms_p50=0.0))
    report.steps[3].refused = [
        Refusal(f"rule{i % 7}", f"a/very/long/scope/of/a/node/block_{i}/conv2d_{i}/BiasAdd", f"reason {i % 9} <b>")
        for i in range(400)
    ]
    report.steps[0].name = "a_pass_with_a_name_that_never_ends_either"
    report.steps[0].applied = {f"rule_{i}": i for i in range(100)}
    report.warnings = ["<script>alert(1)</script>", "long " * 100]
    report.environment["cpu"] = '"><img src=x onerror=alert(1)>'
    report.command = "tfopt-optimize --model='<style>'"
    return report


REPORTS = [Report, sample, without_measurements, hard]


@pytest.mark.parametrize("make", REPORTS)
def test_json_round_trip_is_exact(make):
    report = make()
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text


def test_json_is_standard_even_with_what_json_has_not(tmp_path):
    report = Report(
        steps=[Step("p", {"paths": (tmp_path,), "n": np.int64(3)}, max_error=math.nan)],
        artifacts=[Artifact("a", "tflite", max_rel_error=-math.inf, latency_ms_p50=np.float32(0.5))],
    )
    text = report.to_json()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["steps"][0]["options"] == {"paths": [str(tmp_path)], "n": 3}
    again = Report.from_json(text)
    assert math.isnan(again.steps[0].max_error)
    assert again.artifacts[0].max_rel_error == -math.inf
    assert again.artifacts[0].latency_ms_p50 == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "r.json: not JSON"),
        ("[]", "r.json: not a report of tfopt"),
        ("{}", "r.json: not a report of tfopt"),
        ('{"schema_version": 99}', "r.json: schema version 1 is the one that this tfopt reads, received 99"),
        ('{"schema_version": "1"}', "received '1'"),
        ('{"schema_version": true}', "received True"),
        ('{"schema_version": 1, "stepps": []}', "Report has no field stepps"),
        ('{"schema_version": 1, "steps": 3}', "wants 'steps' to be a list of objects"),
        ('{"schema_version": 1, "steps": [3]}', "wants 'steps' to be a list of objects"),
        ('{"schema_version": 1, "steps": [{}]}', "Step: .*name"),
        ('{"schema_version": 1, "artifacts": [{"name": "a", "kind": "b", "accuracy": 1}]}', "Metric to be an object"),
    ],
)
def test_what_is_no_report_is_one_clear_line(text, message):
    with pytest.raises(TfoptError, match=message) as caught:
        Report.from_json(text, "r.json")
    assert "\n" not in str(caught.value)


def test_refusals_are_grouped_by_rule_and_reason():
    refused = [Refusal("a", "n1", "x"), Refusal("b", "n2", "x"), Refusal("a", "n3", "y"), Refusal("b", "n4", "x")]
    assert group_refusals(refused) == [("b", "x", ["n2", "n4"]), ("a", "x", ["n1"]), ("a", "y", ["n3"])]


@pytest.mark.parametrize("make", REPORTS)
def test_the_table_fits_a_terminal(make):
    lines = make().table().splitlines()
    assert max(len(line) for line in lines) <= 120
    assert all(line == line.rstrip() for line in lines)


def test_the_table_shows_all_numbers_together():
    text = sample().table()
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line and not line.startswith(" ")}
    expected = "serving 104 KB 22% 86.1 KB 40% 22.6k 5.31M 2.6e-07 91.40% 0.830 1.58x 1.12 271 MB"
    assert " ".join(rows["serving"]) == expected
    assert "n=500" in text
    assert rows["fold_affine"][1:4] == ["131", "->", "57"]
    assert "REJECTED: accuracy 87.40% is 4.00 points below" in text
    assert "refused 14x affine: the ReLU in between" in text
    assert "WARNING: stem/FusedBatchNormV3" in text
    artifacts = [line for line in text.splitlines() if re.search(r"^(original|serving|float32|int8) ", line)]
    assert len({len(line) for line in artifacts}) == 1  # aligned


def test_what_is_in_the_weights_is_shown_where_it_is_known():
    report = sample()
    assert "entropy" not in report.table() + report.html()
    report.artifacts[-1].zeros, report.artifacts[-1].entropy_bytes = 0.8125, 12_345
    for drawn in (report.table(), report.html()):
        assert "weights: 81.2% zeros; 12.3 KB if each tensor were coded by its entropy" in drawn


def test_different_sample_counts_are_shown_with_each_value():
    report = sample()
    report.artifacts[1].accuracy = Metric("auc", 0.91512, 400)
    assert "0.9151 n=400" in report.table()
    assert "91.40% n=500" in report.table()


@pytest.mark.parametrize("make", REPORTS)
def test_the_page_is_well_formed_and_needs_nothing_else(make):
    text = make().html()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    assert not re.search(r"@import|url\(|https?://", text)


def test_the_page_escapes_what_it_is_told():
    report = hard()
    text = report.html()
    page = Page(text)
    assert "<script>alert(1)</script>" in page.text
    assert "reason 0 <b>" in page.text
    assert report.command in page.text
    assert report.environment["cpu"] in page.text


def test_the_page_tells_the_run():
    text = " ".join(Page(sample().html()).text.split())
    for expected in (
        "The serving model is 4.5 times smaller than the original and 1.58 times as fast; "
        "accuracy is 91.40% as before (500 rows).",
        "The smallest device model, int8, is 9.5 times smaller",
        "accuracy is 91.00% instead of 91.40% (500 rows)",
        "412 → 57",
        "before: 131 nodes after: 57 nodes",
        "identity \N{MULTIPLICATION SIGN}120",
        "15 refused, for 2 reasons",
        "block_0/add, block_1/add, block_2/add, block_3/add, block_4/add, block_5/add, and 8 more",
        "probably exported with training=True",
        "input_1 float32 (?, 49, 10, 1)",
        "tensorflow 2.21.0",
        "--eval_data=kws.npz",
        "Size and accuracy",
        "Size and latency",
    ):
        assert expected in text
    assert "Size and error" in Page(without_measurements().html()).text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"bytes": 1000, "latency_ms_p50": 1.0},
            "is of the original's size and as fast as it; on the inputs tried its outputs differ by up to 1.0e-07",
        ),
        ({"bytes": 700}, "is 30% smaller than the original;"),
        ({"bytes": 1300, "latency_ms_p50": 2.0}, "is 30% larger than the original and 0.500 times as fast;"),
        ({"bytes": 100, "max_rel_error": None}, "is 10 times smaller than the original."),
        ({"bytes": 500, "gzip_bytes": 20}, "is 50% smaller than the original (40 times once zipped);"),
        ({"bytes": 500, "gzip_bytes": 300}, "is 50% smaller than the original;"),
    ],
)
def test_headlines(change, expected):
    original = Artifact("original", "saved_model", bytes=1000, gzip_bytes=800, latency_ms_p50=1.0)
    serving = dataclasses.replace(Artifact("serving", "saved_model", max_rel_error=1e-7), **change)
    assert expected in words.headline(Report(artifacts=[original, serving]))[0]


def test_headlines_of_nothing():
    assert words.headline(Report()) == ["No artifact was written."]
    rejected = Artifact("int8", "tflite", rejected="crash")
    assert words.headline(Report(artifacts=[rejected])) == ["No artifact passed: everything was rejected."]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.size, 999, "999 B"),
        (words.size, 1000, "1.00 KB"),
        (words.size, 999_499, "999 KB"),
        (words.size, 999_999, "1.00 MB"),
        (words.size, 2.5e9, "2.50 GB"),
        (words.size, None, "-"),
        (words.count, 22_604, "22.6k"),
        (words.milliseconds, 0.0123, "0.0123"),
        (words.milliseconds, 1234.5, "1234"),
        (words.milliseconds, 0, "0"),
        (words.error, 0.0, "0"),
        (words.error, 2.6e-7, "2.6e-07"),
        (words.quality, Metric("accuracy", 0.914, 500), "91.40%"),
        (words.quality, Metric("auc", 0.91512, 500), "0.9151"),
        (words.quality, Metric("mse", 123.456, 500), "123.5"),
    ],
)
def test_words(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize(
    ("values", "axis"),
    [
        ([0.914, 0.914, 0.914, 0.91, 0.87], Axis("accuracy", words.share)),
        ([1e-7, 1e-3, 0.0, 0.05, 0.2], Axis("error", words.error, log=True)),
        ([0.0, 0.0, 0.0, 0.0, 0.0], Axis("error", words.error, log=True)),
        ([5.0, 5.0, 5.0, 5.0, 5.0], Axis("ms", words.milliseconds, from_zero=True)),
        ([0.1, 1.0, 10.0, 100.0, math.inf], Axis("ms", words.milliseconds)),
    ],
)
def test_marks_ticks_and_labels_stay_on_paper_and_apart(values, axis):
    points = [Point(f"artifact_{i}", 10_000 * 3**i, value, "tflite") for i, value in enumerate(values)]
    chart = scatter("t", points, Axis("size", words.size), axis)
    assert chart.x_ticks and chart.y_ticks
    for mark in chart.points:
        assert LEFT <= mark.x <= WIDTH - RIGHT
        assert TOP <= mark.y <= HEIGHT - BOTTOM
        assert 0 < mark.label_x < WIDTH and 0 < mark.label_y < HEIGHT - BOTTOM
    order = sorted(range(len(values)), key=lambda i: values[i])
    heights = [chart.points[i].y for i in order]
    assert heights == sorted(heights, reverse=True)
    assert len({(m.label_x, m.label_y) for m in chart.points}) == len(points)


def sensitive(count: int) -> Report:
    layers = [
        {
            "node": f"call/net/block_{i}/conv",
            "error": 0.01 * (i % 7 + 1),
            "bits": (4, 8, 32)[i % 3],
            "bytes": 100 * i + 7,
        }
        for i in range(count)
    ]
    return Report(steps=[Step("mixed_precision", sensitivity=layers)])


def test_layers_are_ranked_and_named_by_what_tells_them_apart():
    layers = sensitive(3).steps[0].sensitivity
    layers += [
        {"node": "call/net/" + "deep/" * 20 + "conv", "error": "Infinity", "bits": 8, "bytes": 1},
        {"node": "call/net/head", "error": 0.0, "bits": 4, "bytes": 1},
    ]
    bars = ranked(layers)
    assert [bar.name for bar in bars if len(bar.name) < 48] == ["block_2/conv", "block_1/conv", "block_0/conv", "head"]
    lengths = {bar.full_name.removeprefix("call/net/")[:7]: bar.length for bar in bars}
    expected = {"deep/de": 100.0, "block_2": 100.0, "block_1": pytest.approx(66.67, abs=0.01), "head": 0.0}
    assert lengths.items() >= expected.items()
    (long,) = (bar.name for bar in bars if bar.error == float("inf"))
    assert long.startswith("...") and long.endswith("deep/conv") and len(long) == 48
    assert ranked([]) == [] and ranked([layers[0]])[0].name == "conv"


def test_both_drawings_show_which_layers_are_sensitive():
    report = Report.from_json(sensitive(45).to_json())
    text = report.table()
    assert text.count("block_") == 5 and "and 40 more layers" in text and max(map(len, text.splitlines())) <= 120
    assert "   7.00%  4 bits     607 B  block_6/conv" in text
    page = Page(report.html())
    assert (
        "Which layers the outputs are sensitive to" in page.text and "and 5 more layers, which bring less" in page.text
    )
    assert report.html().count('class="layer"') == 40
    assert "sensitive" not in sample().html() and "more layers" not in sample().table()


def test_tensorflow_is_not_imported():
    code = "import tfopt.report, tfopt.data, tfopt.metrics, sys; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("cls", [Report, Step, Refusal, Artifact, Metric])
def test_the_schema_is_documented(cls):
    text = (Path(__file__).parent.parent / "docs/report.md").read_text("utf-8")
    for field in dataclasses.fields(cls):
        assert f"`{field.name}`" in text or f'"{field.name}"' in text
