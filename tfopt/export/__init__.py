"""Writing a model to disk: SavedModel for TensorFlow Serving, TFLite for devices."""
