"""Makes one page that shows runs: no file beside it, nothing from a network.

The tables are made here. Plotly, whose JavaScript stands in the page, draws the curves; page.js
hands them to it from the numbers in the page, and shows the grids.
"""

import base64
import datetime
import html
import importlib.resources
import io
import itertools
import json
import pathlib

from PIL import Image

from run import results
from scripts.compare import runs as reading
from scripts.compare import tables

FOLDER = pathlib.Path(__file__).parent
LARGEST = 800  # pixels of a grid's longer side; a larger one is made smaller
QUALITY = 85
# What all evaluations of the page have alike is not shown in their table.
SETTINGS = ("weights", "sampling_method", "num_steps", *results.GUIDANCE, "num_samples",
            "evaluator", "features", "labels", "reference")  # fmt: skip
OF_ROWS = {"r=t": "rows with r = t", "r<t": "rows with r < t"}


def page(runs, most_grids):
    """Returns the page as text.

    Args:
      runs: list of `Run`.
      most_grids: of each run and kind, spread over time.

    Raises:
      ValueError: plotly is not installed.
    """
    parts = {name: (FOLDER / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    data = {"runs": [_data(run, most_grids) for run in runs], "charts": charts(runs)}
    filled = {
        "TITLE": html.escape(", ".join(run.name for run in runs[:3]) + ", ..." * (len(runs) > 3)),
        "CSS": parts["css"],
        "PLOTLY": plotly().replace("</script", "<\\/script"),
        "JS": parts["js"],
        "DATE": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "RUNS": _runs(runs),
        "TABLES": "".join(_section(runs, *section) for section in tables.sections(runs)),
        "RESULTS": _results(runs),
        "OPTIONS": _section(runs, "", tables.options(runs)),
        "DATA": _json(data),
    }
    head, *rest = parts["html"].split("{{")
    for piece in rest:  # one pass, so that nothing in a run's own words is filled in
        name, _, tail = piece.partition("}}")
        head += filled[name] + tail
    return head


def plotly():
    """Returns the JavaScript of plotly. ValueError where the package is not installed."""
    try:
        folder = importlib.resources.files("plotly")
    except ModuleNotFoundError:
        raise ValueError('--html draws with plotly: pip install "plotly>=7.1,<8"') from None
    return (folder / "package_data" / "plotly.min.js").read_text("utf-8")


def charts(runs):
    """Returns the charts of page.js as JSON has them: losses, metrics, and one for the rest.

    A metric has a chart for each evaluator, number of samples and reference, with a line by name
    for each kind of weights, steps and guidance.
    """
    drawings = []
    for metric in dict.fromkeys(metric for run in runs for metric in tables.losses(run)):
        title, rows = metric.name.split("/")
        lines = {metric.name: [_line(tables.points(run, metric.name)) for run in runs]}
        drawings.append(_chart(title.replace("_", " "), OF_ROWS[rows], "loss", lines))
    scores = {metric for run in runs for metric in run.scores}
    for (title, how), group in itertools.groupby(sorted(scores), key=_title):
        group = sorted(group, key=lambda metric: -sum(metric in run.scores for run in runs))
        lines = {
            metric.name.partition("/")[2]: [_line(run.scores.get(metric, {})) for run in runs]
            for metric in group
        }
        higher = group[0].higher_is_better
        note = f"{'higher' if higher else 'lower'} is better; {how}"
        drawings.append(_chart(title, note, "score", lines, higher))
    drawn = {name for chart in drawings for name in chart["lines"]}
    if names := {name for run in runs for name in run.curves} - drawn:
        first = next((name for name in ("v_loss", "loss") if name in names), None)
        order = sorted(names, key=lambda name: (name != first, name))
        lines = {name: [_line(tables.points(run, name)) for run in runs] for name in order}
        drawings.append(_chart("", "any other number", "other", lines))
    return drawings


def _title(metric):
    return metric.name.split("/")[0], metric.measure


def _chart(title, note, kind, lines, higher=False):
    return {"title": title, "note": note, "kind": kind, "lines": lines, "higher": higher}


def _line(points):
    """Returns a curve as JSON has it; five digits are more than a screen shows."""
    return {"steps": list(points), "values": [float(f"{x:.5g}") for x in points.values()]}


def _data(run, most_grids):
    """Returns what page.js shows of a run beside its curves."""
    grids, notes = {}, []
    for kind, files in run.grids.items():
        for step in spread(sorted(files), most_grids):
            try:
                grids.setdefault(kind, {})[step] = data_uri(files[step])
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                notes.append(f"{files[step].name}: no picture ({type(error).__name__})")
    batch = reading.batch_size(run.options)
    return {"name": run.name, "batch": batch, "grids": grids, "notes": notes}


def spread(values, most):
    """Thins a list out to `most` values, evenly spread, the first and the last with them."""
    if len(values) <= most:
        return values
    last = len(values) - 1
    return [values[last - round(i * last / max(most - 1, 1))] for i in reversed(range(most))]


def data_uri(path):
    """Returns a picture as text that stands for it in a page; a large one smaller.

    Raises:
      OSError, ValueError, SyntaxError: it is no whole picture.
    """
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.load()
        if max(image.size) > LARGEST:
            image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            stream, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").save(stream, "JPEG", quality=QUALITY)
            content = stream.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _json(value):
    """Returns JSON that can stand in a script element, whatever text is in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Tables ---------------------------------------------------------------------------------------


def _runs(runs):
    """Returns the runs' names, each a button that shows and hides it, and where they lie."""
    items = []
    for i, run in enumerate(runs):
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in run.notes)
        items.append(
            f'<li class="run c{i % 8}{" dashed" * (i >= 8)}">'
            f"<button aria-pressed=true data-run={i}><i></i>{html.escape(run.name)}</button>"
            f"<small>{html.escape(str(run.path))}</small>{notes}</li>"
        )
    return f"<ul id=runs>{''.join(items)}</ul>"


def _section(runs, title, table):
    """Returns a table {label: [text by run, or None]} below its title."""
    if not table:
        return ""
    rows = [_row(html.escape(name), map(_cell, cells)) for name, cells in table.items()]
    title = f"<h3>{html.escape(title)}</h3>" if title else ""
    return title + _table(["", *(run.name for run in runs)], rows)


def _cell(text):
    if text is None:
        return "<span class=none>not known</span>"
    return f"<b>{html.escape(text)}</b>" if " *" in text else html.escape(text)


def _results(runs):
    """Returns the table of all evaluations, by evaluator, the best of each first."""
    evaluations = [(i, run, result) for i, run in enumerate(runs) for result in run.results]
    if not evaluations:
        return "<p>No evaluation yet."
    evaluations.sort(key=lambda one: _rank(one[2]))
    everything = [result for _, _, result in evaluations]
    settings = [
        name for name in SETTINGS
        if len({json.dumps(result.get(name)) for result in everything}) > 1
    ]  # fmt: skip
    alike = [f"{name} {_plain(everything[0][name])}" for name in SETTINGS
             if name not in settings and name in everything[0]]  # fmt: skip
    numbers = dict.fromkeys(name for result in everything for name in results.numbers(result))
    names = ["checkpoint_step", *settings, *numbers]
    rows = [
        _row(f'<span class="c{i % 8}"><i></i>{html.escape(run.name)}</span>',
             (_sortable(result.get(name)) for name in names))
        for i, run, result in evaluations
    ]  # fmt: skip
    said = f"<p>All: {html.escape(', '.join(alike))}." if alike else ""
    return said + _table(["run", "step", *names[1:]], rows, "sortable")


def _rank(result):
    """Puts equals together, and the best by the first of their metrics first."""
    name, value = next(iter(results.numbers(result).items()), ("", None))
    if not reading.number(value):
        return "", 0
    sign = -1 if reading.Metric(name, "").higher_is_better else 1
    return results.measure(result, name), sign * value


def _sortable(value):
    shown = html.escape(_plain(value))
    return f"<data value={value!r}>{shown}</data>" if reading.number(value) else shown


def _plain(value):
    return tables.number(value) if value is None or reading.number(value) else str(value)


def _table(head, rows, kind=""):
    cells = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in head)
    return (
        f'<div class=wide tabindex=0><table class="{kind}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(label, cells):
    return f"<tr><th scope=row>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
