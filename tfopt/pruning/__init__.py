"""Zeros in kernels: which weights go, and how masks change while a model is trained."""
