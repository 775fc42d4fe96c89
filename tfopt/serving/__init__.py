"""TensorFlow Serving: the request's form, what a deployment needs, a model server, a load test, and batch tuning."""
