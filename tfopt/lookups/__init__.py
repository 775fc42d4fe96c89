"""What a column of one id a row becomes on its way through sparse tensors to a table, and one lookup in its place."""
