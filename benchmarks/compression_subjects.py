"""What the compression benchmark compresses: a trained model, the rows that it may learn from, and those that score.

`train` may be learned from, `validation` is for choices, and `test` for the figures alone. No row is in two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import fashion, mnist
from benchmarks.models import SEED, all_models
from benchmarks.quantization_cases import case
from benchmarks.samples import DATA as SHARED_DATA

DATA = fashion.DATA
REPRESENTATIVE = 1_000
KWS_SEEN = 300  # of 500 rows
KWS_COPIES = 9
FACES = {"train": 2_000, "test": 500}  # made-up pictures for the net that reads faces


@dataclass(frozen=True)
class Subject:
    """A model and its data: .npz files keyed by `key`, the input's name, and `label`.

    Attributes:
        saved_model: the original.
        representative: unlabelled rows to calibrate on, of `train`.
        train: labelled rows, with changed copies of each (mirrored, moved) where that leaves the label as it is.
        unlabelled: the same rows without their labels.
        test: what scores.
        truth: what the labels of `test` are.
    """

    name: str
    saved_model: Path
    key: str
    representative: Path
    train: Path
    unlabelled: Path
    test: Path
    truth: str = "labels"


def subject(name: str) -> Subject:
    """Returns a subject, training its model and making its files where they are missing.

    Args:
        name: of `fashion.KNOWN`, or of `mnist.NETS` with its seed ("lenet5_0"), or kws-ds-cnn, mobilenet-v1-025,
            face-xception-mini.

    Raises:
        SystemExit: the name is unknown, or the model's files are not on this machine.
    """
    if name in fashion.KNOWN:
        splits = fashion.data()
        if name == "fashion_lenet5":  # beside TFMOT: rows as they are
            files = splits["representative"], splits["train"], splits["representative"]
        else:
            files = _changed("fashion", splits["train"], mirrored=True, copies=1)
        return Subject(name, fashion.models([name])[name], "image", *files, splits["test"])
    net, _, seed = name.rpartition("_")
    if net in mnist.NETS:
        splits = mnist.data()
        files = _changed("mnist", splits["train"], mirrored=False, copies=2)
        return Subject(name, mnist.model(net, int(seed))[0], "image", *files, splits["test"])
    paths = all_models([name])
    if not paths:
        raise SystemExit(f"{name}: its files are not on this machine")
    saved_model = Path(paths[name])
    if name == "kws-ds-cnn":
        rows = np.load(SHARED_DATA / "kws" / "kws01_first500.npz")
        images, labels = rows["input_1"], rows["label"].astype(np.int64)
        seen, classes = _spoken(images[:KWS_SEEN], labels[:KWS_SEEN])
        files = _write("kws300", "input_1", seen, classes)
        test = DATA / "kws300_test.npz"
        if not test.is_file():
            np.savez(test, input_1=images[KWS_SEEN:], label=labels[KWS_SEEN:])
        return Subject(name, saved_model, "input_1", files[2], *files[1:], test)  # all that there is
    if name == "mobilenet-v1-025":
        found = case(name)
        return Subject(
            name, saved_model, found.key, found.representative, found.train, found.train, found.test, found.truth
        )
    return _faces(name, saved_model)


def _write(prefix: str, key: str, images: np.ndarray, labels: np.ndarray) -> tuple[Path, Path, Path]:
    """Returns (representative, labelled, unlabelled) files of rows."""
    files = tuple(DATA / f"{prefix}_{kind}.npz" for kind in ("representative", "labelled", "unlabelled"))
    if not all(file.is_file() for file in files):
        DATA.mkdir(parents=True, exist_ok=True)
        chosen = np.random.default_rng(SEED).choice(len(images), min(REPRESENTATIVE, len(images)), replace=False)
        np.savez(files[0], **{key: images[chosen]})
        np.savez(files[1], **{key: images}, label=labels)
        np.savez(files[2], **{key: images})
    return files[0], files[1], files[2]


def _changed(prefix: str, train: Path, mirrored: bool, copies: int) -> tuple[Path, Path, Path]:
    """Returns what `_write` does, of the training rows and of copies that are moved by up to 1 pixel."""
    if not (DATA / f"{prefix}_changed_unlabelled.npz").is_file():
        stored, rng = np.load(train), np.random.default_rng(SEED)
        images, labels = stored["image"], stored["label"]
        parts = [images]
        for _ in range(copies):
            padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
            moves = rng.integers(0, 3, (len(images), 2))
            moved = np.stack([x[i : i + 28, j : j + 28] for x, (i, j) in zip(padded, moves, strict=True)])
            if mirrored:
                turned = rng.random(len(images)) < 0.5
                moved[turned] = moved[turned, :, ::-1]
            parts.append(moved)
        _write(f"{prefix}_changed", "image", np.concatenate(parts), np.tile(labels, copies + 1))
    kinds = "representative", "labelled", "unlabelled"
    representative, labelled, unlabelled = (DATA / f"{prefix}_changed_{kind}.npz" for kind in kinds)
    return representative, labelled, unlabelled


def _spoken(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns spectrograms (rows, frames, coefficients, 1) and copies of them, earlier or later and with some noise."""
    rng, parts = np.random.default_rng(SEED), [rows]
    for _ in range(KWS_COPIES):
        padded = np.pad(rows, ((0, 0), (4, 4), (0, 0), (0, 0)), "edge")
        moves = rng.integers(0, 9, len(rows))
        moved = np.stack([x[i : i + rows.shape[1]] for x, i in zip(padded, moves, strict=True)])
        noise = rng.normal(0, 0.1, rows.shape) * rows.std((0, 1), keepdims=True)
        parts.append((moved + noise).astype(np.float32))
    return np.concatenate(parts), np.tile(labels, KWS_COPIES + 1)


def _faces(name: str, saved_model: Path) -> Subject:
    """Grey crops of scikit-learn's two photographs, as there are no faces at hand; the net's answers are the labels."""
    from benchmarks.quantization_cases import _collages, default_signature, predict
    from tfopt import runtime

    files = {kind: DATA / f"{name}_{kind}.npz" for kind in ("representative", "train", "unlabelled", "test")}
    with runtime.open(saved_model) as program:
        ((key, spec),) = program.signatures[default_signature(program)].inputs.items()
        if not all(file.is_file() for file in files.values()):
            size = spec.shape[1]
            for number, (kind, count) in enumerate(FACES.items()):
                drawn = _collages(count, kind == "test", np.random.default_rng(SEED + number))
                step = drawn.shape[1] // size
                cut = drawn[:, : size * step, : size * step].mean(-1, keepdims=True)
                rows = cut.reshape(count, size, step, size, step, 1).mean((2, 4)).astype(np.float32)
                labels = predict(program, rows, key).argmax(1)
                np.savez(files[kind], **{key: rows}, label=labels)
                if kind == "train":
                    np.savez(files["unlabelled"], **{key: rows})
                    np.savez(files["representative"], **{key: rows[:200]})
    truth = "top class of the original"
    return Subject(name, saved_model, key, *files.values(), truth=truth)
