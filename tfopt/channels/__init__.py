"""Channels of a graph: which go together, what each is worth, and how they leave the tensors."""
