"""The runs of the compression benchmark: which model, which recipe, which rows, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks import mnist

Step = str | dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of `tfopt-optimize`.

    Attributes:
        subject: see compression_subjects.
        passes: what follows the lossless ones; or the name of a recipe that ships with tfopt.
        rows: what it learns from: "train" (labelled), "unlabelled", or "" for the representative rows alone.
        tflite: the files that are scored.
        options: of a recipe that ships, as --set takes them.
        bar: what is asked for, in words.
    """

    subject: str
    passes: tuple[Step, ...] | str
    rows: str = "train"
    tflite: tuple[str, ...] = ("float32", "int8")
    options: tuple[str, ...] = ()
    bar: str = ""
    group: str = field(default="", compare=False)


def _deep(sparsity: float, clusters: int, epochs: int, rate: float) -> tuple[Step, ...]:
    """Deep Compression (Han et al. 2016): prune, share the values, train the shared ones, quantize."""
    return (
        {
            "pass": "prune_magnitude",
            "sparsity": sparsity,
            "first": 0.9,
            "epochs": epochs,
            "learning_rate": rate,
            "batch_size": 128,
            "end": 0.6,
        },
        {"pass": "cluster", "clusters": clusters, "epochs": 2, "learning_rate": 1e-4, "batch_size": 128},
        "quantize",
    )


# Channels that go for good leave less to say about where the weights that stay are.
_NARROW = {"pass": "prune_channels", "target": "params", "share": 0.75, "epochs": 1, "batch_size": 128}
_SIZE = "error at most the original's; gzip {} times smaller than the float32 weights"
_SLIM = "half the FLOPs, 1.6x lower latency, fewer parameters, at most {} points lost"
_TFMOT = "accuracy at least TFMOT's - 0.1 points, gzip at most TFMOT's + 2%"
_SLIMMED = ("prune_channels.epochs=4", "prune_channels.batch_size=128", "prune_channels.learning_rate=0.002")
_QUARTER = ("prune_channels.share=0.25",)
_RANKED = ({"pass": "low_rank", "rank": "flops", "flops": 0.35, "epochs": 2, "batch_size": 128}, "quantize")
_RANK = "30% fewer FLOPs, faster, at most 0.5 points lost"

EPOCHS = 2  # of every training beside TFMOT's


_KWS: tuple[Step, ...] = (
    {"pass": "prune_magnitude", "sparsity": 0.6, "first": 0.6, "epochs": 40},
    {"pass": "cluster", "clusters": 16, "epochs": 15},
    {"pass": "train_quantized", "epochs": 10},
)


def _trained(name: str, **options: Any) -> dict[str, Any]:
    return {"pass": name, **{"epochs": EPOCHS, "batch_size": 128, "alpha": 0.8, **options}}


# Recipe -> (what tfopt runs, the file that is compared); compression_peers.py has TFMOT's side.
BESIDE_TFMOT: dict[str, tuple[tuple[Step, ...], str]] = {
    "prune80": ((_trained("prune_magnitude", sparsity=0.8, learning_rate=1e-3),), "float32"),
    "prune_2_4": ((_trained("prune_magnitude", pattern="2:4", learning_rate=1e-3),), "float32"),
    "cluster16": (  # TFMOT trains all weights while it clusters, tfopt the centroids: half of the epochs come before
        (
            _trained("distill", epochs=EPOCHS // 2, learning_rate=1e-3),
            _trained("cluster", clusters=16, entropy=1.0, epochs=EPOCHS // 2, learning_rate=1e-3),
        ),
        "float32",
    ),
    "pcqat": (
        (
            _trained("prune_magnitude", sparsity=0.8, learning_rate=1e-3),
            _trained("cluster", clusters=16, entropy=4.0, learning_rate=1e-4),
            _trained("train_quantized", learning_rate=1e-4),
        ),
        "int8",
    ),
}
BESIDE_TFMOT_SUBJECT = "fashion_lenet5"

RUNS: dict[str, Run] = {
    **{
        f"lenet_300_100_{seed}": Run(
            f"lenet_300_100_{seed}", _deep(0.966, 16, 10, 1e-3), tflite=("int8",), bar=_SIZE.format(60), group="deep"
        )
        for seed in mnist.SEEDS
    },
    **{
        f"lenet5_{seed}": Run(
            f"lenet5_{seed}",
            (_NARROW, *_deep(0.903, 16, 7, 1e-3)),
            tflite=("int8",),
            bar=_SIZE.format(100),
            group="deep",
        )
        for seed in mnist.SEEDS
    },
    "resnet20_slim": Run("fashion_resnet20", "slim50", options=_SLIMMED, bar=_SLIM.format(0.3), group="slim"),
    "resnet20_slim_unlabelled": Run(
        "fashion_resnet20", "slim50", "unlabelled", options=_SLIMMED, bar=_SLIM.format(0.6), group="slim"
    ),
    "mobilenet_slim": Run("fashion_mobilenet", "slim50", options=_SLIMMED, bar=_SLIM.format(0.3), group="slim"),
    "mobilenet_slim_unlabelled": Run(
        "fashion_mobilenet", "slim50", "unlabelled", options=_SLIMMED, bar=_SLIM.format(0.6), group="slim"
    ),
    "mobilenet_v1_slim25": Run(
        "mobilenet-v1-025", "slim50", "unlabelled", options=_QUARTER, bar="runs end to end", group="probes"
    ),
    "face_xception_slim25": Run(
        "face-xception-mini", "slim50", "unlabelled", options=_QUARTER, bar="runs end to end", group="probes"
    ),
    **{
        f"tfmot_{name}": Run(BESIDE_TFMOT_SUBJECT, steps, tflite=(kind,), bar=_TFMOT, group="tfmot")
        for name, (steps, kind) in BESIDE_TFMOT.items()
    },
    "mlp_low_rank": Run("fashion_mlp", _RANKED, bar=_RANK, group="low_rank"),
    "vgg_low_rank": Run("fashion_vgg", _RANKED, bar=_RANK, group="low_rank"),
    "kws": Run("kws-ds-cnn", _KWS, "unlabelled", bar="half the gzip bytes, at most 1 point lost", group="kws"),
}
