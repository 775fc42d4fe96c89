"""What the quantization benchmark runs on: a model, rows to calibrate on, rows to score, and how a file is scored."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import fashion
from benchmarks.fashion_nets import NETS
from benchmarks.models import SEED, all_models
from benchmarks.samples import DATA as SHARED_DATA

DATA = fashion.DATA
KWS_CALIBRATION = 100
IMAGES = {"representative": 100, "validation": 200, "train": 500, "test": 500}  # for mobilenet-v1-025

SURE = 0.25  # probability of the top class


@dataclass(frozen=True)
class Case:
    """A model and its data: .npz files keyed by `key`, the input's name; all but `representative` hold `label`.

    Attributes:
        saved_model: the original.
        validation: for choices that look at accuracy. No file but `train` holds a row of another.
        train: what training may use; of kws-ds-cnn, that is `validation` again.
        epochs: of quantization-aware training, the same for all who do it.
        truth: what the labels are.
    """

    name: str
    saved_model: Path
    key: str
    representative: Path
    validation: Path
    test: Path
    train: Path
    epochs: int
    truth: str = "labels"


def case(name: str) -> Case:
    """Returns one case, training its model and making its files where they are missing.

    Raises:
        SystemExit: the name is unknown, or the model's files are not on this machine.
    """
    if name in NETS:
        splits = fashion.data()
        return Case(name, fashion.models([name])[name], "image", *_in_order(splits), epochs=2)
    if name not in CASES:
        raise SystemExit(f"unknown model {name}; known: {', '.join(CASES)}")
    paths = all_models([name])
    if not paths:
        raise SystemExit(f"{name}: its files are not on this machine")
    if name == "kws-ds-cnn":
        splits = _kws()
        return Case(name, Path(paths[name]), "input_1", *_in_order(splits), epochs=20)
    splits = _pictures(paths[name])
    key = next(iter(np.load(splits["representative"])))  # Keras 2 counts the inputs that a process makes
    return Case(name, Path(paths[name]), key, *_in_order(splits), epochs=20, truth="top class of the float model")


CASES = (*NETS, "kws-ds-cnn", "mobilenet-v1-025")


def _in_order(splits: dict[str, Path]) -> tuple[Path, Path, Path, Path]:
    return splits["representative"], splits["validation"], splits["test"], splits.get("train", splits["validation"])


def _kws() -> dict[str, Path]:
    """Rows 0-99 are all that may be looked at, also with their labels; rows 100-499 score."""
    paths = {split: DATA / f"kws_{split}.npz" for split in ("representative", "validation", "test")}
    if not all(path.is_file() for path in paths.values()):
        DATA.mkdir(parents=True, exist_ok=True)
        stored = np.load(SHARED_DATA / "kws" / "kws01_first500.npz")
        rows, labels = stored["input_1"], stored["label"].astype(np.int64)
        seen, unseen = slice(KWS_CALIBRATION), slice(KWS_CALIBRATION, None)
        np.savez(paths["representative"], input_1=rows[seen])
        np.savez(paths["validation"], input_1=rows[seen], label=labels[seen])
        np.savez(paths["test"], input_1=rows[unseen], label=labels[unseen])
    return paths


def _pictures(saved_model: str) -> dict[str, Path]:
    """Images for an ImageNet network without ImageNet, in [-1, 1], labelled by the network itself.

    Crops of scikit-learn's two photographs, every other one with a garment of Fashion-MNIST on it, in changed colours.
    The crops that score come from the right halves of the photographs, all others from the left halves. Only images of
    which the network is as sure as it mostly is of real ones are kept: who guesses agrees with nobody.
    """
    paths = {split: DATA / f"pictures_{split}.npz" for split in IMAGES}
    if not all(path.is_file() for path in paths.values()):
        from tfopt import runtime

        with runtime.open(saved_model) as program:
            (key,) = program.signatures[default_signature(program)].inputs
            for number, (split, path) in enumerate(paths.items()):
                rng, images, labels = np.random.default_rng(SEED + number), [], []
                while sum(map(len, images)) < IMAGES[split]:
                    drawn = _collages(100, split == "test", rng)
                    scores = predict(program, drawn, key)
                    sure = scores.max(1) >= SURE
                    images.append(drawn[sure])
                    labels.append(scores[sure].argmax(1))
                rows, top = (np.concatenate(x)[: IMAGES[split]] for x in (images, labels))
                np.savez(path, **{key: rows}, **({} if split == "representative" else {"label": top}))
    return paths


def _collages(count: int, test: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns (count, 224, 224, 3) float32 in [-1, 1]."""
    import sklearn.datasets
    import tensorflow as tf

    files = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    photographs = [tf.io.decode_jpeg(file.read_bytes()).numpy() for file in files]
    photographs = [x[:, x.shape[1] // 2 :] if test else x[:, : x.shape[1] // 2] for x in photographs]
    garments = np.load(fashion.data()["test" if test else "train"])["image"]
    images = np.empty((count, 224, 224, 3), np.float32)
    for index in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        size = rng.integers(80, min(photograph.shape[:2]))
        top, left = (rng.integers(0, edge - size + 1) for edge in photograph.shape[:2])
        crop = photograph[top : top + size, left : left + size][:, :: rng.choice((-1, 1))]
        image = tf.image.resize(crop / 255.0, (224, 224)).numpy()
        if index % 2:
            garment = tf.image.resize(garments[rng.integers(len(garments))], (224, 224)).numpy()
            image = image * (1 - garment) + garment * rng.uniform(0, 1, 3)
        images[index] = 2 * np.clip(image * rng.uniform(0.6, 1.4, 3), 0, 1) - 1
    return images


def predict(program, rows: np.ndarray, key: str, batch: int = 100) -> np.ndarray:
    """Returns the scores (rows, classes) of a tfopt.runtime.Program; in batches where its batch is not fixed."""
    signature = default_signature(program)
    spec = next(iter(program.signatures[signature].inputs.values()))
    size = spec.shape[0] or batch
    scores = [program.run(signature, {spec.name: rows[i : i + size]}) for i in range(0, len(rows), size)]
    return np.concatenate([next(iter(x.values())).reshape(-1, next(iter(x.values())).shape[-1]) for x in scores])


def default_signature(program) -> str:
    """Returns serving_default, or the first signature of a tfopt.runtime.Program."""
    return "serving_default" if "serving_default" in program.signatures else next(iter(program.signatures))


def score(top: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction of rows whose top class is the label."""
    return float((top == labels).mean())


def _score_file(path: str, found: Case) -> dict:
    """Scores one file row by row; leaves the top classes beside it."""
    from tfopt import runtime

    stored = np.load(found.test)
    with runtime.open(path, 1) as program:
        top = predict(program, stored[found.key], found.key, batch=1).argmax(1)
        note = "" if program.loader != runtime.PLAIN else "without XNNPACK"
    np.save(Path(path).with_suffix(".top.npy"), top)
    return {"accuracy": score(top, stored["label"]), "samples": len(top), "note": note}


def main() -> None:
    """Scores one file; benchmarks/quantization.py runs this in a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    Path(arguments.json).write_text(json.dumps(_score_file(arguments.path, case(arguments.model))))


if __name__ == "__main__":
    main()
