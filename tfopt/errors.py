"""The one exception of tfopt that a user can cause."""

from __future__ import annotations

import re


class TfoptError(Exception):
    """Bad usage or bad input: one line that names the culprit and says what to do.

    Scripts print the line and end with exit code 2; it never carries a stack trace to the user.
    """


_NOISE = (
    "Graph execution error",
    "Detected at node",
    "Node: ",
    "<stack traces",
    "File ",
    "Original stack trace",
    "Traceback",
)


def one_line(error: BaseException) -> str:
    """The line of an exception's message that says what went wrong, without TensorFlow's frame around it."""
    lines = [line.strip() for line in str(getattr(error, "message", None) or error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(_NOISE)]
    if not telling:
        return type(error).__name__
    line = re.sub(r"\{\{function_node [^}]*\}\} *", "", telling[0])
    return re.sub(r"\{\{node ([^}]*)\}\}", r"node '\1'", line)


def printable(text: str) -> str:
    """The text with control characters escaped: names come from files of others, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
