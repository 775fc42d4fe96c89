"""A local model server that speaks TensorFlow Serving's protocols: for trying and tests, not for production."""
