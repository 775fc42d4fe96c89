"""Rewrites as data: one family a file, each next to the equation or the fact that justifies it."""
