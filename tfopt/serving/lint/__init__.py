"""The linter: rules about files, signatures, ops, batching, warmup and TFLite on stock TensorFlow Serving."""
