"""train_quantized: trains the weights and the ranges of a quantized model, so that it answers as the original does.

min over W, r of  loss(f(q(W), q_r(x)), teacher(x))     the gradient goes straight through the rounding
                                                        (Jacob et al. 2018; tf.quantization.fake_quant_*)
"""

from __future__ import annotations

from tfopt.fake_quant import OPS
from tfopt.graph import split
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.passes.quantize import _ROWS, calibrate
from tfopt.rewrite import Log
from tfopt.trainable import demote, promote, symmetric
from tfopt.training import fine_tune
from tfopt.training_loop import Settings


def run(
    model: Model,
    log: Log,
    data: Data,
    bits: int = 8,
    epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
    alpha: float = 0.5,
    calibrator: str = "best",
) -> None:
    """Quantizes as `quantize` does, and trains, in place.

    Args:
      model: the model.
      log: gets what was quantized, and how the loss fell.
      data: with representative rows, labelled rows, or both.
      bits: of the weights of convolutions and dense layers: 8 or 4.
      epochs, batch_size, learning_rate: of the training; the rate falls along a cosine.
      alpha: the share of the labels in the loss, where there are labels; the rest is the teacher's.
      calibrator: how the ranges that the training starts from are found.

    Raises:
      TfoptError: no rows, nothing to quantize, nothing to train.
    """
    rows = data.need_rows("train_quantized")
    if data.engine is not None:
        training = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "alpha": alpha}
        data.engine.train_quantized(model, log, data, training)
        return
    few = rows.take(slice(0, None, max(len(rows) // _ROWS, 1)))
    quantized, _ = calibrate(model, log, data.signature, few, bits, calibrator, data.integer_outputs, data.observe)
    promoted = promote(quantized, data.signature, ranges=True)
    names, transform = symmetric(quantized, promoted)
    history = fine_tune(
        quantized,
        data.signature,
        data.rows,
        data.teacher,
        data.labelled,
        Settings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, alpha=alpha, seed=data.seed),
        transform=transform,
        names=names,
        checkpoint=data.checkpoint,
        title="train_quantized",
    )
    held = {split(node.input[0])[0] for node in quantized.graph.nodes.values() if node.op in OPS}
    demote(quantized, set(promoted) - held)
    log.notes.append(history.summary())
    model.graph = quantized.graph


PASS = Pass(
    "train_quantized",
    run,
    options={
        "bits": 8,
        "epochs": 5,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "alpha": 0.5,
        "calibrator": "best",
    },
    needs=("fold_affine",),
    lossless=False,
    learns=True,
    device=True,
    makes=("ranges",),
    keeps=("sparsity", "clusters"),
)
