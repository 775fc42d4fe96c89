"""Batch tuning: the batch curve, a model of the batcher, the choice, and its check by load tests."""
