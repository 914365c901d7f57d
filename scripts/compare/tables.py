"""The tables that both the terminal and the page show, and how they look in the terminal."""

from configs import default, load_config, saved
from scripts.compare import runs as reading

WIDEST = 40  # characters of a value in the terminal
LOSSES = ("r=t", "r<t")


STAR = "*: the best of all runs with the same evaluator and reference"


def facts(runs):
    """Returns how far and how fast runs are: {what: [number or None by run]}."""
    names = dict.fromkeys(name for run in runs for name in run.facts)
    return {name: [run.facts.get(name) for run in runs] for name in names}


def options(runs):
    """Returns all options of runs: {option: [value as people write it by run, or None]}.

    An option that a run does not have is empty; of a run whose options are not known all are None.
    """
    names = dict.fromkeys(name for run in runs for name in run.options or ())
    return {name: [written(run, name) for run in runs] for name in names}


def written(run, name):
    """Returns an option of a run as people write it, or None where its options are not known."""
    return load_config.written(run.options.get(name, "")) if run.options else None


def differing(runs):
    """Returns the options that differ between runs, as `options` does.

    Of one run: those that are not the default's. A run whose options are not known differs in none.
    """
    beside = []
    if len(runs) == 1:
        beside.append(runs[0]._replace(options=saved.flat(default.get_config())))
    return {
        name: values[: len(runs)]
        for name, values in options([*runs, *beside]).items()
        if len({*values} - {None}) > 1
    }


def scores(runs):
    """Returns the best of each metric: {Metric: ["3.1 at 200 *, last 4" by run]}.

    Evaluations come first, then the raw losses by kind of row. A star marks the best of all runs,
    but not among the losses, which depend on the objective's options, nor among numbers of an
    evaluator that is not known.
    """
    series = [run.scores | losses(run) for run in runs]
    best = {}
    for metric in sorted({m: None for one in series for m in one}, key=lambda m: not m.measure):
        sign = -1 if metric.higher_is_better else 1
        points = [one.get(metric, {}) for one in series]
        values = [sign * value for of in points for value in of.values()]
        several = sum(map(bool, points)) > 1 and metric.measure not in ("", reading.UNKNOWN)
        best[metric] = [_best(of, sign, min(values) if several else None) for of in points]
    return best


def _best(points, sign, leader):
    if not points:
        return number(None)
    step, value = min(points.items(), key=lambda point: sign * point[1])
    star = " *" if sign * value == leader else ""
    last = max(points)
    after = f", last {number(points[last])}" if last != step else ""
    return f"{number(value)} at {step}{star}{after}"


def losses(run):
    """Returns the raw losses by kind of row: {Metric: {step: value}}."""
    return {
        reading.Metric(name, ""): points(run, name)
        for name in run.curves
        if name.startswith("raw_loss") and name.endswith(LOSSES)
    }


def points(run, name):
    """Returns a curve of training without its gaps: {step: value}."""
    pairs = zip(run.steps, run.curves.get(name, ()), strict=False)
    return {step: value for step, value in pairs if value is not None}


def number(value):
    """Returns a number for people: whole ones in groups of three, others with five digits."""
    if value is None:
        return "–"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


def sections(runs):
    """Yields the tables (title, {label: [text by run]}): facts, options that differ, metrics."""
    yield "", {name: list(map(number, values)) for name, values in facts(runs).items()}
    title = "options that differ" if len(runs) > 1 else "options that are not the default's"
    yield title, differing(runs)
    of_measure = {}
    for metric, values in scores(runs).items():
        of_measure.setdefault(metric.measure or "losses", {})[metric.name] = values
    yield from of_measure.items()


# In the terminal --------------------------------------------------------------------------------


def text(runs, width):
    """Returns all tables as text at most `width` wide, in blocks of as many runs as fit.

    A single run or name that is wider than that stands alone.
    """
    rows = [("run", [run.name for run in runs])]
    for title, table in sections(runs):
        rows += [("", ())] + [(title, ())] * bool(title) if table else []
        indent = "  " if title else ""
        rows += [(indent + name, list(map(_short, values))) for name, values in table.items()]
    if any("*" in cell for _, cells in rows for cell in cells):
        rows += [("", ()), (STAR, ())]
    return "\n\n".join(_block(rows, part) for part in _parts(rows, len(runs), width))


def _parts(rows, count, width):
    """Returns which runs stand beside each other: lists of their numbers."""
    label = max(len(name) for name, values in rows if values)
    parts, left = [], 0
    for i in range(count):
        wide = 2 + max(len(values[i]) for _, values in rows if values)
        if not parts or left < wide:
            parts.append([])
            left = width - label
        parts[-1].append(i)
        left -= wide
    return parts


def _block(rows, part):
    cells = [[name, *(values[i] for i in part if values)] for name, values in rows]
    widths = [max(map(len, column)) for column in zip(*(c for c in cells if c[1:]), strict=True)]
    return "\n".join("  ".join(map(str.ljust, cell, widths)).rstrip() for cell in cells)


def _short(value):
    value = "?" if value is None else value
    if len(value) <= WIDEST:
        return value
    return f"{value[: WIDEST // 2 - 1]}…{value[-WIDEST // 2 :]}"
