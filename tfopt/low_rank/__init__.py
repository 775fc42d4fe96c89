"""Layers as products of smaller ones: the factors, which fit where, their ranks, and the edit of the graph."""
