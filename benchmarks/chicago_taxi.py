"""Wide and deep Estimator on serialized tf.Examples: does tfopt keep its four signatures and its quality?

    python -m benchmarks.chicago_taxi

Scores every labelled record of the Chicago taxi TFRecords (label: the tip is over 20% of the fare) with the
original and with tfopt's serving model, each in a v1 session, through all four signatures; prints AUC and the largest
difference per output. Records without a tip or a fare have no label and are left out of AUC, not of the differences.
"""

from __future__ import annotations

import tempfile

import numpy as np

from benchmarks import peers, samples
from benchmarks.models import all_models

NAME = "tfx-chicago-taxi"


def labels(records: list[bytes]) -> np.ndarray:
    """Returns 1.0 where the tip is over 20% of the fare, 0.0 where not, NaN where either is missing."""
    import tensorflow as tf

    found = []
    for record in records:
        feature = tf.train.Example.FromString(record).features.feature
        tips, fare = (list(feature[key].float_list.value) for key in ("tips", "fare"))
        found.append(float(tips[0] > 0.2 * fare[0]) if tips and fare else np.nan)
    return np.array(found)


def score(directory: str, signature: str, records: list[bytes]) -> dict[str, np.ndarray]:
    """Returns the signature's outputs for all records, run in batches of 500."""
    program = peers.Program(peers.serving(directory, signature))
    (key,) = program.candidate.inputs
    parts = [program.run({key: np.array(records[at : at + 500], dtype=object)}) for at in range(0, len(records), 500)]
    program.close()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def main() -> None:
    """Command line."""
    from sklearn.metrics import roc_auc_score

    original = all_models([NAME])[NAME]
    records = {split: samples.taxi_records(split) for split in ("Split-eval", "Split-train")}
    truth = {split: labels(rows) for split, rows in records.items()}
    with tempfile.TemporaryDirectory() as scratch:
        optimized, _ = peers.tfopt_optimized(original, scratch)
        kept = peers.read_meta_graph(optimized).signature_def
        print(f"signatures: {', '.join(sorted(kept))}")
        print("| split | signature.output | original AUC | tfopt AUC | records | max difference |")
        print("|---|---|---|---|---|---|")
        for signature in sorted(peers.read_meta_graph(original).signature_def):
            for split, rows in records.items():
                before, after = (score(path, signature, rows) for path in (original, optimized))
                for output in sorted(before):
                    error = peers.relative_error({output: before[output]}, after)
                    cells = ["-", "-", str(len(rows))]
                    if output in ("logistic", "scores", "outputs", "probabilities"):
                        known = ~np.isnan(truth[split])
                        values = [x[output].reshape(len(rows), -1)[known, -1] for x in (before, after)]
                        cells = [f"{roc_auc_score(truth[split][known], x):.4f}" for x in values] + [str(known.sum())]
                    print(f"| {split} | {signature}.{output} | {' | '.join(cells)} | {error:.1e} |")


if __name__ == "__main__":
    main()
