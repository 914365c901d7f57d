"""One page that shows runs: no file beside it, nothing from a network, all of it written here.

The tables are made here. The curves and the grids are drawn by page.js from numbers that stand in
the page as JSON.
"""

import base64
import datetime
import html
import io
import json
import math
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
            "evaluator", "features", "labels")  # fmt: skip


def page(runs, most_grids):
    """The page as text.

    Args:
      runs: list of `Run`.
      most_grids: of each run and kind, spread over time.
    """
    parts = {name: (FOLDER / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    filled = {
        "TITLE": html.escape(", ".join(run.name for run in runs[:3]) + ", ..." * (len(runs) > 3)),
        "CSS": parts["css"],
        "JS": parts["js"],
        "DATE": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "RUNS": _runs(runs),
        "SUMMARY": _summary(runs),
        "DIFFERING": _differing(runs),
        "RESULTS": _results(runs),
        "OPTIONS": _options(runs),
        "DATA": _json([_data(run, most_grids) for run in runs]),
    }
    text = parts["html"]
    head, *rest = text.split("{{")
    for piece in rest:  # one pass, so that nothing in a run's own words is filled in
        name, _, tail = piece.partition("}}")
        head += filled[name] + tail
    return head


def _data(run, most_grids):
    """What page.js draws of a run."""
    curves = {name: list(map(_rounded, values)) for name, values in run.curves.items()}
    scores = {
        name: {
            "steps": list(points),
            "values": list(map(_rounded, points.values())),
            "higher": reading.higher_is_better(name),
        }
        for name, points in run.scores.items()
    }
    grids, notes = {}, []
    for kind, files in run.grids.items():
        for step in spread(sorted(files), most_grids):
            try:
                grids.setdefault(kind, {})[step] = data_uri(files[step])
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                notes.append(f"{files[step].name}: no picture ({type(error).__name__})")
    return {"name": run.name, "batch": reading.batch_size(run.options), "steps": run.steps,
            "curves": curves, "scores": scores, "grids": grids, "notes": notes}  # fmt: skip


def spread(values, most):
    """At most so many of a list, evenly spread, the first and the last with them."""
    if len(values) <= most:
        return values
    last = len(values) - 1
    return [values[last - round(i * last / max(most - 1, 1))] for i in reversed(range(most))]


def data_uri(path):
    """A picture as text that stands for it in a page; a large one smaller.

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
    """JSON that can stand in a script element, whatever text is in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value):
    """A number with five digits, which is more than a screen shows."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


# Tables ---------------------------------------------------------------------------------------


def _runs(runs):
    """The runs' names, each a button that shows and hides it, and where they lie."""
    items = []
    for i, run in enumerate(runs):
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in run.notes)
        items.append(
            f'<li class="run c{i % 8}{" dashed" * (i >= 8)}">'
            f"<button aria-pressed=true data-run={i}><i></i>{html.escape(run.name)}</button>"
            f"<small>{html.escape(str(run.path))}</small>{notes}</li>"
        )
    return f"<ul id=runs>{''.join(items)}</ul>"


def _summary(runs):
    """How far, how fast, how good."""
    rows = [
        _row(html.escape(name), map(_number, values)) for name, values in tables.facts(runs).items()
    ]
    for name, (last, best) in tables.scores(runs).items():
        better = "higher" if reading.higher_is_better(name) else "lower"
        label = f"{html.escape(name)} <small>{better} is better</small>"
        rows.append(_row(label, map(_scores, last, best)))
    return _table(["", *(run.name for run in runs)], rows)


def _differing(runs):
    found = tables.differing(runs)
    if not found:
        return "<p>None." if any(run.options for run in runs) else "<p>Not known."
    rows = [_row(_code(name), map(_value, values)) for name, values in found.items()]
    return _table(["", *(run.name for run in runs)], rows)


def _options(runs):
    names = dict.fromkeys(name for run in runs for name in run.options or ())
    rows = [
        _row(
            _code(name),
            [_value(tables.shown(run.options.get(name)) if run.options else None) for run in runs],
        )
        for name in names
    ]
    return _table(["", *(run.name for run in runs)], rows) if rows else "<p>Not known."


def _results(runs):
    """All evaluations, the best first; a click on a column's head sorts by it."""
    found = [(i, run, result) for i, run in enumerate(runs) for result in run.results]
    found.sort(key=lambda one: _rank(one[2]))
    if not found:
        return "<p>No evaluation yet."
    everything = [result for _, _, result in found]
    settings = [
        name for name in SETTINGS
        if len({json.dumps(result.get(name)) for result in everything}) > 1
    ]  # fmt: skip
    alike = [f"{name} {_plain(everything[0][name])}" for name in SETTINGS
             if name not in settings and name in everything[0]]  # fmt: skip
    numbers = dict.fromkeys(name for result in everything for name in results.numbers(result))
    rows = []
    for i, run, result in found:
        cells = [result["checkpoint_step"], *(result.get(name) for name in (*settings, *numbers))]
        name = f'<span class="c{i % 8}"><i></i>{html.escape(run.name)}</span>'
        rows.append(_row(name, (_sortable(cell) for cell in cells)))
    head = ["run", "step", *settings, *numbers]
    said = f"<p>All: {html.escape(', '.join(alike))}." if alike else ""
    return said + _table(head, rows, "sortable")


def _rank(result):
    """Puts the best by the first of its metrics first."""
    name, value = next(iter(results.numbers(result).items()), ("", None))
    if not reading.number(value):
        return True, 0
    return False, -value if reading.higher_is_better(name) else value


def _table(head, rows, kind=""):
    cells = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in head)
    return (
        f'<div class=wide tabindex=0><table class="{kind}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(label, cells):
    return f"<tr><th scope=row>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _code(text):
    return f"<code>{html.escape(text)}</code>"


def _value(text):
    if text is None:
        return "<span class=none>not known</span>"
    return f"<div class={'long' if len(text) > 24 else 'short'}>{_code(text)}</div>"


def _number(value):
    return "<span class=none>–</span>" if value is None else tables.number(value)


def _scores(last, best):
    if last is None:
        return "<span class=none>–</span>"
    value = tables.number(best.value)
    shown = f"<b>{value}</b>" if best.leads else value
    where = f"step {best.step:,}" + ("" if last == best or last.step == best.step else
                                      f"; last {tables.number(last.value)}")  # fmt: skip
    return f"{shown} <small>{where}</small>"


def _sortable(value):
    shown = html.escape(_plain(value))
    return f"<data value={value!r}>{shown}</data>" if reading.number(value) else shown


def _plain(value):
    return tables.number(value) if reading.number(value) else "–" if value is None else str(value)
