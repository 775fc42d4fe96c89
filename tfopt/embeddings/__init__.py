"""The forms in which a table of embeddings takes fewer bytes."""
