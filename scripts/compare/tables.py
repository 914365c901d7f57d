"""The tables that both the terminal and the page show, and how they look in the terminal."""

from typing import NamedTuple

from configs import default, saved
from scripts.compare import runs as reading

WIDEST = 40  # characters of a value in the terminal
LOSSES = ("r=t", "r<t")


class Point(NamedTuple):
    """A number and the step it belongs to; `leads`: no run has a better one."""

    value: float
    step: int
    leads: bool


def facts(runs):
    """How far and how fast: {what: [number or None by run]}."""
    names = dict.fromkeys(name for run in runs for name in run.facts)
    return {name: [run.facts.get(name) for run in runs] for name in names}


def differing(runs):
    """The options that differ between runs: {option: [value by run, or None]}.

    Of one run: those that are not the default's, beside it. A run whose options are not known
    differs in none.
    """
    known = [run.options for run in runs if run.options]
    if len(runs) == 1:
        known.append(saved.flat(default.get_config()))
    names = dict.fromkeys(name for options in known for name in options)
    return {
        name: [shown(run.options.get(name)) if run.options else None for run in runs]
        for name in names
        if len({shown(options.get(name)) for options in known}) > 1
    }


def scores(runs):
    """Last and best of each metric: {name: ([Point or None by run] last, the same best)}.

    Evaluations come first, then the raw losses by kind of row.
    """
    series = [run.scores | losses(run) for run in runs]
    names = dict.fromkeys(name for run in runs for name in run.scores)
    names |= dict.fromkeys(name for run in runs for name in losses(run))
    found = {}
    for name in names:
        sign = -1 if reading.higher_is_better(name) else 1
        last = [max(x.get(name, {}).items(), default=None) for x in series]
        best = [
            min(x.get(name, {}).items(), key=lambda p: sign * p[1], default=None) for x in series
        ]
        found[name] = (_with_leader(last, sign), _with_leader(best, sign))
    return found


def losses(run):
    """The raw losses by kind of row: {name: {step: value}}."""
    return {
        name: {step: x for step, x in zip(run.steps, values, strict=True) if x is not None}
        for name, values in run.curves.items()
        if name.startswith("raw_loss") and name.endswith(LOSSES)
    }


def _with_leader(points, sign):
    values = [sign * point[1] for point in points if point]
    return [
        Point(p[1], p[0], len(values) > 1 and sign * p[1] == min(values)) if p else None
        for p in points
    ]


def shown(value):
    """A value of an option for people."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ",".join(map(shown, value))
    return f"{value:g}" if type(value) in (int, float) and abs(value) < 1e6 else str(value)


def number(value):
    """A number for people: whole ones in groups of three, others with five digits."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


# In the terminal --------------------------------------------------------------------------------


def text(runs, width):
    """All tables as text at most `width` characters wide, in blocks of as many runs as fit.

    A single run or name that is wider than that stands alone.
    """
    rows = [(["run"], [run.name for run in runs]), None]
    rows += [([name], [_number(x) for x in values]) for name, values in facts(runs).items()]
    if found := differing(runs):
        title = "options that differ" if len(runs) > 1 else "options that are not the default's"
        rows += [None, ([title], None)]
        rows += [([f"  {name}"], list(map(_short, values))) for name, values in found.items()]
    if found := scores(runs):
        rows += [None, (["metrics" + " (*: the best of all runs)" * (len(runs) > 1)], None)]
        for name, (last, best) in found.items():
            rows.append(([f"  {name}", "last"], list(map(_point, last))))
            if best != last:
                rows.append((["", "best"], list(map(_point, best))))
    return "\n\n".join(_block(rows, part) for part in _parts(rows, len(runs), width))


def _parts(rows, count, width):
    """Which runs stand beside each other: lists of their numbers."""
    widths = [max(len(row[1][i]) for row in rows if row and row[1]) for i in range(count)]
    parts, left = [], 0
    for i, wide in enumerate(widths):
        left -= wide + 2
        if left < 0 or not parts:
            parts.append([])
            left = width - _label_width(rows) - wide - 2
        parts[-1].append(i)
    return parts


def _label_width(rows):
    return sum(max(len(row[0][k]) for row in rows if row and row[1] and k < len(row[0]))
               for k in _label_columns(rows)) + 2 * len(_label_columns(rows))  # fmt: skip


def _label_columns(rows):
    return range(max(len(row[0]) for row in rows if row))


def _block(rows, part):
    cells = [row and (row[0], row[1] and [row[1][i] for i in part]) for row in rows]
    columns = _label_columns(rows)
    full = [
        [*row[0], *[""] * (len(columns) - len(row[0])), *row[1]] for row in cells if row and row[1]
    ]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for row in cells:
        if row is None or row[1] is None:
            lines.append(row[0][0] if row else "")
            continue
        words = [*row[0], *[""] * (len(columns) - len(row[0])), *row[1]]
        lines.append("  ".join(map(str.ljust, words, widths)).rstrip())
    return "\n".join(lines)


def _number(value):
    return "-" if value is None else number(value)


def _point(point):
    return f"{number(point.value)} at {point.step}{' *' * point.leads}" if point else "-"


def _short(value):
    value = "?" if value is None else value
    if len(value) <= WIDEST:
        return value
    return f"{value[: WIDEST // 2 - 1]}…{value[-WIDEST // 2 :]}"
