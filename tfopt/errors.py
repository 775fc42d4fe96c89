"""The one exception of tfopt that a user can cause."""

from __future__ import annotations


class TfoptError(Exception):
    """Bad usage or bad input: one line that names the culprit and says what to do.

    Scripts print the line and end with exit code 2; it never carries a stack trace to the user.
    """
