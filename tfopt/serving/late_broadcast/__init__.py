"""What is the same for all rows of a request, computed once: the ops it passes through, shapes, and products split."""
