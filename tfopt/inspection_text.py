"""An inspection as text for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from tfopt.errors import printable
from tfopt.hazards import Hazard
from tfopt.inspection import Feature, Inspection, Tensor
from tfopt.report import Refusal, group_refusals
from tfopt.report_words import size

WIDTH = 120
_NAMES = 3  # nodes that are named for each group
_REASONS = 6  # groups of refusals that are spelt out
_LONG = 45  # characters of a node's name that are shown: its end says more than its beginning


def draw(found: Inspection, top: int = 10) -> str:
    """Returns everything that a reader should know, the worst first.

    Args:
      found: the inspection.
      top: how many ops, weights, features and variables are listed at most.
    """
    lines = _head(found)
    lines += _security(found, top)
    lines += _section("Probable bugs", [line for bug in found.bugs[:top] for line in _wrap(bug, "  ! ")])
    lines += _section("Signatures", _signatures(found))
    lines += _section("tf.Example features", _examples(found, top))
    lines += _section(f"Ops{_of(found)}", _ops(found.ops, top))
    weights = sum(tensor.bytes or 0 for tensor in found.weights)
    title = f"Weights ({len(found.weights):,}, {size(weights)})"
    lines += _section(title, _tensors(found.weights, top)) if found.weights else []
    lines += _section("State variables (assigned by a signature)", _tensors(found.state, top))
    lines += _section("Tables", [line for table in found.tables for line in _wrap(_short(table), "  ")])
    lines += _section("Assets", [line for asset in dict.fromkeys(found.assets) for line in _wrap(asset, "  ")])
    lines += _section("What the lossless recipe would do", _steps(found))
    lines += _section("Opportunities", [line for text in found.opportunities for line in _wrap(text, "  - ")])
    return printable("\n".join(line.rstrip() for line in lines).rstrip() + "\n")


def _head(found: Inspection) -> list[str]:
    lines = _wrap(found.path, "")
    tags = f", tags {' '.join(found.tags)}" if found.tags else ""
    lines += _wrap(found.origin + tags, "  ")
    total = sum(found.files.values())
    largest = sorted(found.files.items(), key=lambda item: -item[1])[:3]
    lines += _flow([f"{size(total)} on disk:", *_commas(f"{name} {size(n)}" for name, n in largest)])
    main, inside, functions = found.nodes
    if main or inside:
        lines += _wrap(f"{main:,} nodes in the main graph, {inside:,} in {functions:,} functions", "  ")
    if found.problem:
        lines += _wrap(f"tfopt cannot optimize it: {found.problem}", "  ! ")
    return lines


def _security(found: Inspection, top: int) -> list[str]:
    lines = [line for layer, why in found.layers for line in _wrap(f"WARNING: layer {layer!r} {why}", "  ! ")]
    active = [h for h in found.hazards if h.used_by and not h.routine]
    for kind, op, hazards in _grouped(active):
        named = ", ".join(_where(h) for h in hazards[:_NAMES]) + (", ..." if len(hazards) > _NAMES else "")
        users = ", ".join(dict.fromkeys(user for h in hazards for user in h.used_by))
        lines += _wrap(f"WARNING: {op} {kind}: {named}; run by {users}", "  ! ")
    for kind, op, hazards in _grouped(h for h in found.hazards if not h.used_by):
        functions = list(dict.fromkeys(h.function or h.node for h in hazards))
        named = ", ".join(functions[:_NAMES]) + (", ..." if len(functions) > _NAMES else "")
        lines += _wrap(f"Only if called from Python: {op} {kind} in {named}", "  ")
    routine = list(dict.fromkeys(h.op for h in found.hazards if h.routine))
    if routine:
        lines += _wrap(f"Saves and restores its own checkpoint, as every SavedModel does ({', '.join(routine)})", "  ")
    if not active and not found.layers:
        lines.insert(0, "  No signature reads or writes files, runs Python or opens connections.")
    return _section("Security", lines)


def _grouped(hazards: Iterable[Hazard]) -> list[tuple[str, str, list[Hazard]]]:
    groups: dict[tuple[str, str], list[Hazard]] = {}
    for hazard in hazards:
        groups.setdefault((hazard.kind, hazard.op), []).append(hazard)
    return [(kind, op, members) for (kind, op), members in groups.items()]


def _where(hazard: Hazard) -> str:
    place = f"{hazard.node!r}" + (f" in function {hazard.function!r}" if hazard.function else "")
    return f"{place} ({hazard.detail})" if hazard.detail else place


def _signatures(found: Inspection) -> list[str]:
    lines = []
    for signature in found.signatures:
        method = signature.method.rpartition("/")[2]
        lines.append(f"  {signature.name}" + (f"  ({method})" if method else ""))
        names = [tensor.name for tensor in [*signature.inputs, *signature.outputs]]
        width = min(max(map(len, names), default=0), 48)
        for arrow, tensors in (("in ", signature.inputs), ("out", signature.outputs)):
            lines += [f"    {arrow}  {tensor.name:<{width}}  {tensor.dtype:<8}  {_shape(tensor)}" for tensor in tensors]
    return lines


def _examples(found: Inspection, top: int) -> list[str]:
    lines: list[str] = []
    shown: dict[str, str] = {}
    for name, features in found.examples.items():
        key = repr(features)
        if key in shown:
            lines.append(f"  {name}: as {shown[key]}")
            continue
        shown[key] = name
        lines.append(f"  {name}: {len(features)} features")
        rows = [[f.name, f.dtype, _length(f), _default(f)] for f in features[: max(top, 20)]]
        lines += [f"    {line}" for line in _columns([["feature", "dtype", "values", "default"], *rows])]
        if len(features) > len(rows):
            lines.append(f"    and {len(features) - len(rows)} more")
    return lines


def _length(feature: Feature) -> str:
    if feature.length != "fixed":
        return feature.length
    return "1" if not feature.shape else " x ".join(map(str, feature.shape))


def _default(feature: Feature) -> str:
    if feature.length != "fixed":
        return "-"
    return "required" if feature.default is None else _clip(str(feature.default), 40)


def _of(found: Inspection) -> str:
    total = sum(found.ops.values())
    return f" ({total:,} in what the signatures run)" if found.weights or found.steps else f" ({total:,} in the file)"


def _ops(ops: dict[str, int], top: int) -> list[str]:
    if not ops:
        return []
    listed = list(ops.items())[: 2 * top]
    more = len(ops) - len(listed)
    return _flow(_commas([*(f"{op} {n:,}" for op, n in listed), *([f"and {more} other ops"] if more else [])]))


def _tensors(tensors: Sequence[Tensor], top: int) -> list[str]:
    total = sum(tensor.bytes or 0 for tensor in tensors)
    rows = []
    for tensor in tensors[:top]:
        share = f"{(tensor.bytes or 0) / total:.1%}" if total else ""
        rows.append([_clip(tensor.name, 70), tensor.dtype, _shape(tensor), size(tensor.bytes), share])
    lines = [f"  {line}" for line in _columns(rows, right=(3, 4))]
    if len(tensors) > top:
        rest = sum(tensor.bytes or 0 for tensor in tensors[top:])
        lines.append(f"  and {len(tensors) - top:,} more, {size(rest)} in all")
    return lines


def _steps(found: Inspection) -> list[str]:
    steps = [step for step in found.steps if step.applied or step.status == "undone"]
    rows = [["pass", "nodes", "weights", "what it does"]]
    for step in steps:
        did = ", ".join(f"{rule} {n}" for rule, n in sorted(step.applied.items(), key=lambda item: -item[1]))
        weights = size(step.weight_bytes_after)
        rows.append([step.name, f"{step.nodes_before} -> {step.nodes_after}", weights, did or "nothing"])
    if not found.steps:
        return []
    if not steps:
        return ["  nothing: the model is as small as the recipe can make it"]
    width = sum(max(len(row[i]) for row in rows) + 2 for i in range(3)) + 2
    lines = []
    for row, line in zip(rows, _columns([row[:3] for row in rows]), strict=True):
        texts = textwrap.wrap(row[3], WIDTH - width)
        lines.append(f"  {line:<{width - 4}}  {texts[0]}")
        lines += [" " * width + text for text in texts[1:]]
    for step in steps:
        if step.status == "undone":
            lines += _wrap(f"{step.name}: {step.notes[-1]}", "  ! ")
    last = {step.name: step for step in found.steps}
    refused = [refusal for step in last.values() for refusal in step.refused]
    affine = [refusal for refusal in refused if refusal.rule == "fold_affine"]
    lines += _wrap(_affine(found, len(affine)), "  ")
    lines += _refusals(affine, "")
    others = [refusal for refusal in refused if refusal.rule != "fold_affine"]
    return lines + (["  Also left as they are:", *_refusals(others, "{rule}: ")] if others else [])


def _refusals(refused: Sequence[Refusal], prefix: str) -> list[str]:
    groups, lines = group_refusals(refused), []
    for group in groups[:_REASONS]:
        names = ", ".join(group.nodes[:_NAMES]) + (", ..." if len(group.nodes) > _NAMES else "")
        several = f" ({len(group.nodes)} nodes)" if len(group.nodes) > 1 else ""
        text = f"{names}{several}: {prefix.format(rule=group.rule)}{group.reason}"
        lines += _wrap(_short(text), "  - ")
    return lines + (
        [f"  - and {len(groups) - _REASONS} more reasons (--format=json)"] if len(groups) > _REASONS else []
    )


def _affine(found: Inspection, left: int) -> str:
    norms = {0: "No batch norms", 1: "1 batch norm"}.get(found.batch_norms, f"{found.batch_norms:,} batch norms")
    if not left:
        return f"{norms}; no scale or shift stays outside of the layers' weights and biases."
    return f"{norms}; {left:,} scales and shifts stay, for these reasons:"


def _shape(tensor: Tensor) -> str:
    if tensor.shape is None:
        return "any shape"
    return "scalar" if not tensor.shape else " x ".join("?" if d is None else str(d) for d in tensor.shape)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *lines] if lines else []


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _wrap(text: str, indent: str) -> list[str]:
    """Lines of a paragraph; what follows a bullet is indented like its text, other paragraphs hang."""
    hanging = len(indent) + (0 if indent.strip() else 2)
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * hanging) or [indent]


def _commas(items: Iterable[str]) -> list[str]:
    listed = list(items)
    return [f"{item}," for item in listed[:-1]] + listed[-1:]


def _flow(items: Sequence[str]) -> list[str]:
    """Lines of items that are not broken inside."""
    lines = [" "]
    for item in items:
        if len(lines[-1]) + 1 + len(item) > WIDTH and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {item}"
    return lines


def _short(text: str) -> str:
    """The text with the ends of the long node names in it."""

    def end(match: re.Match[str]) -> str:
        name = match.group()
        cut = name.find("/", len(name) - _LONG)
        return "..." + (name[cut:] if cut >= 0 else name[-_LONG:])

    return re.sub(rf"[\w./:-]{{{_LONG + 5},}}", end, text)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 2]}...{text[-(length - length // 2 - 1) :]}"
