"""Runs side by side (scripts/compare): what is read, what is told of half a run, the page."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from configs import default
from scripts.compare import __main__ as compare
from scripts.compare import page, runs, tables
from utils import images

MEASURE = "meanflow, 500 samples, 01234567 as the reference"
EVIL = "</script><img src=x onerror=alert(1)>{{CSS}}"


def write(folder, fids=(), options=(), lines=20, text=None, grids=(), **result):
    """A run's folder: its lines at steps 10, 20, ..., then evaluations at 100, 200, ..."""
    folder.mkdir(parents=True)
    if options is not None:
        config = default.get_config().to_dict()
        for name, value in dict(options).items():
            *parents, key = name.split(".")
            (config[parents[0]] if parents else config)[key] = value
        path = folder / "checkpoints" / str(10 * lines) / "config" / "metadata"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(config))
    written = [
        {"step": 10 * i, "raw_loss/r=t": 100 / i, "raw_loss/r<t": 50 / i, "loss": 0.9,
         "epoch": i / 3, "images_per_second": 1000 * i}
        for i in range(1, lines + 1)
    ]  # fmt: skip
    found = [
        {"checkpoint_step": 100 * (i + 1), "num_samples": 500, "num_steps": 1, "weights": "ema",
         "evaluator": "meanflow", "sampling_method": "ode", "fid": fid, "inception_score": 1 / fid,
         "reference": "data", "reference_content": "0123456789", **result}
        for i, fid in enumerate(fids)
    ]  # fmt: skip
    for one in found:
        names = {k: f"{k}@{one['num_samples']}/ema_1step" for k in ("fid", "inception_score")}
        written.append({"step": one["checkpoint_step"], **{n: one[k] for k, n in names.items()}})
    text = "".join(json.dumps(line) + "\n" for line in written) if text is None else text
    (folder / "metrics.jsonl").write_text(text)
    if found:
        (folder / "results.json").write_text(json.dumps(found))
    for name in grids:
        (folder / "samples").mkdir(exist_ok=True)
        images.save_png(folder / "samples" / name, np.full((20, 30, 1), 7, np.uint8))
    return folder


@pytest.fixture
def two(tmp_path):
    grids = ["grid_00000100.png", "grid_00000200.png", "grid_00000200_2step.png",
             "steps_00000200.png", "real.png"]  # fmt: skip
    a = write(tmp_path / "a", [9.0, 3.0, 5.0], grids=grids)
    b = write(tmp_path / "b", [8.0, 4.0], {"training.batch_size": 64, "method.kappa": 0.25})
    return [a, b]


def run(capsys, *words):
    status = compare.main([str(word) for word in words])
    return status, *capsys.readouterr()


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_table(two, capsys):
    status, out, err = run(capsys, *two)
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert (status, err) == (0, "b: no grids\n")
    assert ["run", "a", "b"] in lines and ["steps", "300", "200"] in lines
    assert ["images seen", "76,800", "12,800"] in lines
    assert ["images/s", "11,000", "11,000"] in lines
    assert ["method.kappa", "0.5", "0.25"] in lines
    assert sum(line[0].startswith(("training.", "method.", "model.")) for line in lines) == 2
    assert [MEASURE] in lines  # the lowest FID is the best, and the highest score
    assert ["fid@500/ema_1step", "3 at 200 *, last 5", "4 at 200"] in lines
    assert ["inception_score@500/ema_1step", "0.33333 at 200 *, last 0.2", "0.25 at 200"] in lines
    assert ["raw_loss/r<t", "2.5 at 200", "2.5 at 200"] in lines


@pytest.mark.parametrize(
    "other",
    [
        {"evaluator": "adm"},
        {"num_samples": 501},
        {"labels": "data"},
        {"label_counts": "ab"},
        {"features": "pixels"},
        {"feature_weights_sha256": "ab"},
        {"reference_content": "9876543210"},
        {"reference_content": None, "reference": "elsewhere"},
    ],
)
def test_only_equals_are_compared(tmp_path, capsys, other):
    folders = [write(tmp_path / name, [x]) for name, x in (("a", 9.0), ("b", 8.0))]
    folders.append(write(tmp_path / "c", [1.0], **other))
    _, out, _ = run(capsys, *folders)
    fids = [line.split()[1:] for line in out.splitlines() if line.startswith("  fid@")]
    assert fids == [
        ["9", "at", "100", "8", "at", "100", "*", "–"],
        ["–", "–", "1", "at", "100"],
    ]
    heads = [line for line in out.splitlines() if re.match(r"\w+, 50\d samples", line)]
    assert heads[0] == MEASURE and len({*heads}) == 2
    found = runs.read_all(folders)[0]
    drawn = [
        lines for c in page.charts(found) if c["kind"] == "score" for lines in c["lines"].values()
    ]
    assert [sum(bool(line["steps"]) for line in lines) for lines in drawn] in (
        [2, 1] * 2,
        [1, 2] * 2,
    )
    ranks = sorted((result for one in found for result in one.results), key=page._rank)
    assert [result["fid"] for result in ranks] in ([8, 9, 1], [1, 8, 9])


def test_a_number_of_an_unknown_evaluator_leads_nowhere(tmp_path, capsys):
    folders = [write(tmp_path / name, [x]) for name, x in (("a", 9.0), ("b", 8.0))]
    for folder in folders:
        (folder / "results.json").unlink()
    _, out, _ = run(capsys, *folders)
    assert re.search(r"^evaluator not known\n  fid@500/ema_1step +9 at 100 +8 at 100$", out, re.M)


def test_a_narrow_terminal_gets_blocks(two):
    found, _ = runs.read_all(two)
    wide, narrow = tables.text(found, 200), tables.text(found, 70)
    assert wide.count("images/s") == 1 and narrow.count("images/s") == 2
    assert max(map(len, narrow.splitlines())) <= 70


def test_of_one_run_the_options_stand_beside_the_defaults(two, capsys):
    _, out, _ = run(capsys, two[1])
    assert re.search(r"not the default's\n  method.kappa +0.25\n  training.batch_size +64\n", out)
    assert "*" not in out


def test_jax_is_not_loaded(two):
    code = "import sys; from scripts.compare import __main__ as m; status = m.main(sys.argv[1:])"
    code += "; sys.exit(status or 'jax' in sys.modules)"
    command = [sys.executable, "-c", code, *two, "--html", two[0].parent / "page.html"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_run_that_has_just_begun(tmp_path, capsys):
    status, out, err = run(capsys, write(tmp_path / "new", options=None, text='{"step": 1, "lo'))
    assert status == 0 and "new" in out
    assert "options are not known" in err and "1 broken line" in err and len(err.splitlines()) == 1


def test_before_the_first_checkpoint_config_yml_has_the_options(tmp_path, capsys):
    folder = write(tmp_path / "new", options=None)
    (folder / "config.yml").write_text("training:\n    batch_size: 32\n    ema_val: [0.5, 0.9]\n")
    found = runs.read(folder, "new")
    assert found.facts["images seen"] == 32 * 200
    assert tables.differing([found])["training.ema_val"] == ["0.5,0.9"]
    for wrong in ("training: [", "- 1", "training: {batch_size: x}"):
        (folder / "config.yml").write_text(wrong)
        status, _, err = run(capsys, folder, "--html", tmp_path / "page.html")
        assert status == 0 and len(err.splitlines()) == 1, wrong
        assert ("config.yml" in err) == (not wrong.endswith("x}"))


@pytest.mark.parametrize(
    "line",
    ["[]", "null", '{"step": "1"}', '{"step": true, "loss": 1}', '{"loss": 1}', "\udcff", ""],
)
def test_what_is_no_line_of_metrics_is_left_out(tmp_path, line):
    good = '{"step": 10, "loss": 1.5, "grad_norm": null, "v_loss": "x", "epoch": NaN}\n'
    folder = write(tmp_path / "a", options=None, text="")
    (folder / "metrics.jsonl").write_bytes((good + line).encode("utf-8", "surrogateescape"))
    found = runs.read(folder, "a")
    assert found.steps == [10] and found.curves["loss"] == [1.5]
    assert found.curves["v_loss"] == [None] and "epochs" not in found.facts
    assert any("1 broken line" in note for note in found.notes) == bool(line)


@pytest.mark.parametrize("text", ["{", "{}", "[1, {}]", '[{"fid": 1, "weights": "ema"}]'])
def test_results_that_are_none_are_told(tmp_path, capsys, text):
    folder = write(tmp_path / "a", [5.0])
    (folder / "results.json").write_text(text)
    status, out, err = run(capsys, folder, "--html", tmp_path / "page.html")
    assert status == 0 and "results.json" in err and len(err.splitlines()) == 1
    assert re.search(r"fid@500/ema_1step +5 at 100", out)  # the log has it


def test_what_is_no_run_is_left_out_in_a_line(two, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    words = [tmp_path / "nowhere", tmp_path / "empty", tmp_path / "file", two[0], f"{two[0]}/"]
    status, out, err = run(capsys, *words)
    assert status == 0 and re.search(r"^run +a$", out, re.M)
    assert [line.split(": ")[-1] for line in err.splitlines()] == [
        "no such folder",
        "no run, for there is none of metrics.jsonl, results.json, checkpoints, samples, "
        "config.yml in it",
        "no folder",
        "given twice",
    ]
    status, out, err = run(capsys, tmp_path / "nowhere")
    assert (status, out) == (1, "") and "no run to show" in err


def test_names_tell_runs_apart(tmp_path, capsys):
    folders = [write(tmp_path / part / "run", [5.0]) for part in ("x", "y")]
    assert [found.name for found in runs.read_all(folders)[0]] == ["x/run", "y/run"]
    assert runs.names([]) == [] and runs.names([tmp_path / "x" / "run"]) == ["run"]


def test_two_evaluators_of_a_run_are_two_metrics(tmp_path):
    folder = write(tmp_path / "a", [5.0], options=None)
    both = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(
        json.dumps([*both, both[0] | {"evaluator": "adm", "fid": 6.0}])
    )
    scores = runs.read(folder, "a").scores
    of = {metric.measure: scores[metric] for metric in scores if metric.name.startswith("fid")}
    assert of == {MEASURE: {100: 5.0}, MEASURE.replace("meanflow", "adm"): {100: 6.0}}


def test_a_long_curve_is_means_of_its_lines(tmp_path):
    found = runs.read(write(tmp_path / "a", lines=1200), "a")
    assert len(found.steps) == 400 and found.steps[-1] == 12000
    assert found.curves["raw_loss/r=t"][0] == pytest.approx((100 + 50 + 100 / 3) / 3)


class Elements(HTMLParser):
    """The elements of a page, and whether anything in them asks for a file or runs by itself."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.outside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action") or name.startswith("on"):
                self.outside.append((tag, name, value))


def test_the_page_stands_alone(two, tmp_path, capsys):
    status, out, _ = run(capsys, *two, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert status == 0 and out.rstrip().endswith("page.html")
    own = text.replace(page.plotly(), "")
    assert len(text) > len(own) + 1_000_000  # plotly is in it
    assert Elements(text).outside == [] and "{{" not in own
    assert "default-src 'none'" in own and not re.search("https?://", own)
    data = data_of(text)
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert charts["fid@500"]["lines"]["ema_1step"] == [
        {"steps": [100, 200, 300], "values": [9, 3, 5]}, {"steps": [100, 200], "values": [8, 4]}
    ]  # fmt: skip
    assert MEASURE in charts["fid@500"]["note"] and not charts["fid@500"]["higher"]
    assert charts["inception_score@500"]["higher"]
    loss = data["charts"][0]["lines"]["raw_loss/r=t"][0]
    assert loss["values"][:2] == [100, 50] and loss["steps"][:2] == [10, 20]
    assert list(charts[""]["lines"])[0] == "loss"
    a, b = data["runs"]
    assert (a["batch"], b["batch"]) == (256, 64)
    assert list(a["grids"][""]) == ["100", "200"] and list(a["grids"]["2step"]) == ["200"]
    assert a["grids"].keys() == {"", "2step", "by steps"}
    assert a["grids"][""]["100"].startswith("data:image/png;base64,")


def test_a_run_with_an_option_that_there_is_no_more(two, tmp_path, capsys):
    old = write(tmp_path / "old", options={"method.of_before": 0.5})
    status, out, _ = run(capsys, *two, old, "--html", tmp_path / "page.html")
    assert status == 0 and "method.of_before" in out
    assert ">method.of_before</th>" in (tmp_path / "page.html").read_text()


def test_words_of_a_run_are_never_markup(tmp_path, capsys):
    """Names of folders and metrics, values of options, and results."""
    folder = write(
        tmp_path / EVIL.replace("/", "|"),
        [5.0],
        {"dataset.root": EVIL},
        evaluator=EVIL,
        labels=EVIL,
    )
    line = json.dumps({"step": 10, EVIL: 1.0, f"{EVIL}/ema_1step": 2.0})
    (folder / "metrics.jsonl").write_text(line + "\n")
    assert run(capsys, folder, "--html", tmp_path / "evil.html")[0] == 0
    assert run(capsys, write(tmp_path / "a", [5.0]), "--html", tmp_path / "plain.html")[0] == 0
    evil, plain = (Elements((tmp_path / f"{name}.html").read_text()) for name in ("evil", "plain"))
    assert evil.outside == [] and not set(evil.tags) - set(plain.tags)
    assert evil.tags.count("script") == 3
    charts = data_of((tmp_path / "evil.html").read_text())["charts"]
    assert EVIL in charts[-1]["lines"]


def test_a_missing_plotly_is_told_in_a_line(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    status, out, err = run(capsys, *two, "--html", tmp_path / "page.html")
    assert status == 1 and "fid@500" in out and 'pip install "plotly' in err.splitlines()[-1]


def test_large_grids_become_smaller_and_broken_ones_are_told(tmp_path):
    folder = write(tmp_path / "a", grids=["grid_00000010.png", "grid_00000020.png"])
    noise = np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), np.uint8)
    images.save_png(folder / "samples" / "grid_00000020.png", noise)
    (folder / "samples" / "grid_00000030.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    (one,) = data_of(page.page(runs.read_all([folder])[0], 24))["runs"]
    assert list(one["grids"][""]) == ["10", "20"]
    assert one["notes"] == ["grid_00000030.png: no picture (UnidentifiedImageError)"]
    assert one["grids"][""]["20"].startswith("data:image/jpeg")
    assert len(one["grids"][""]["20"]) < 1_000_000


@pytest.mark.parametrize(
    "most, expected", [(1, [9]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, [*range(10)])]
)
def test_grids_are_spread_over_time(most, expected):
    assert page.spread([*range(10)], most) == expected


def test_a_page_that_cannot_be_written(two, capsys):
    status, _, err = run(capsys, *two, "--html", two[0] / "no" / "page.html")
    assert status == 1 and err.splitlines()[-1].endswith("No such file or directory")
