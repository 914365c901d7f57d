"""The demo (scripts/demo.py) without gradio: what is offered, what is drawn, what is refused."""

import socket
import sys
import types
from pathlib import Path

import make
import numpy as np
import pytest

import generator
import parts
from scripts import demo

ROOT = Path(__file__).resolve().parent.parent
PIXELS = ["dataset.image_size=4", "dataset.image_channels=1", "dataset.vae=none"]
IMPROVED = ["model.cls=imfDiT", "model.aux_head_depth=1", "method.name=improved"]


class Model:
    """Stands for a `generator.Generator`: its images tell what was asked for."""

    step, image_shape, conditions = 1200, (4, 4, 1), ()

    def __init__(self, num_classes, *words):
        self.config = make.config(*PIXELS, f"dataset.num_classes={num_classes}", *words)
        self.num_classes = num_classes
        method = parts.OBJECTIVES[self.config.method.name]
        self.parts = types.SimpleNamespace(method=method)
        self.asked = []

    def sample(self, labels, seed, num_steps, omega):
        self.asked.append((list(labels), seed, num_steps, omega))
        values = np.asarray(labels, np.uint8)[:, None, None, None]
        return np.broadcast_to(values, (len(labels), 4, 4, 1))


def cells(picture, rows, columns):
    """The middle pixel of each image of a grid."""
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    return picture[height // 2 :: height, width // 2 :: width, 0].tolist()


@pytest.mark.parametrize(
    "num_classes, words, expected",
    [
        (3, [], (3, 3, 4, 1, None)),  # trained with its guidance
        (1000, ["sampling.num_steps=2,1"], (1000, 10, 4, 2, None)),
        (0, ["method.name=flow", "sampling.num_steps=250"], (0, 10, 4, 32, None)),
        (3, ["method.name=flow"], (3, 3, 4, 1, (1.0, 8.0))),
        (3, ["method.name=flow", "sampling.omega=9"], (3, 3, 4, 1, (9.0, 9.0))),
        (3, [*IMPROVED, "method.omega_max=6", "sampling.omega=2.5"], (3, 3, 4, 1, (2.5, 6.0))),
        (3, [*IMPROVED, "method.omega_max=1"], (3, 3, 4, 1, None)),
    ],
)
def test_what_is_offered(num_classes, words, expected):
    assert demo.controls(Model(num_classes, *words), columns=4) == (*expected, ())


def test_a_grid_has_a_row_of_every_class_or_one_class_alone():
    model = Model(3)
    offered = demo.controls(model, columns=4)
    picture, line = demo.answer(model, offered, seed=7)
    assert picture.dtype == np.uint8 and picture.shape == (3 * 36, 4 * 36, 3)
    assert cells(picture, 3, 4) == [[0] * 4, [1] * 4, [2] * 4]
    assert line.startswith("12 images in ") and "one evaluation of" in line
    picture, line = demo.answer(model, offered, label=2, seed=7, num_steps=4)
    assert cells(picture, 3, 4) == [[2] * 4] * 3 and "4 evaluations of" in line
    # As many images whatever is chosen: nothing is compiled anew, and the noise is the same.
    assert [(len(labels), *rest) for labels, *rest in model.asked] == [
        (12, 7, 1, None), (12, 7, 4, None)
    ]  # fmt: skip
    many = Model(1000)
    demo.answer(many, demo.controls(many, columns=1))
    assert many.asked[0][0] == [*range(0, 1000, 100)]


def test_guidance_goes_only_to_networks_that_take_it():
    for words, omega in (([], None), (["method.name=flow"], 1.5)):
        model = Model(3, *words)
        demo.answer(model, demo.controls(model, 4), omega=1.5)
        assert model.asked[0][3] == omega


@pytest.mark.parametrize(
    "choice, word",
    [
        ({"label": 3}, "class: a whole number from 0 to 2"),
        ({"label": -1}, "class"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": None}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"num_steps": 0}, "steps: a whole number from 1 to 32"),
        ({"num_steps": 33}, "steps"),
        ({"num_steps": 1.5}, "steps"),
        ({"num_steps": True}, "steps"),
        ({"omega": 8.5}, "guidance: a number above 0, up to 8"),
        ({"omega": 0}, "guidance"),
        ({"omega": float("nan")}, "guidance"),
        ({"omega": None}, "guidance"),
    ],
)
def test_what_is_no_choice_is_refused_in_a_line(choice, word):
    model = Model(3, "method.name=flow")
    with pytest.raises(ValueError, match=word) as error:
        demo.answer(model, demo.controls(model, 4), **{"omega": 1.0} | choice)
    assert len(str(error.value).splitlines()) == 1 and not model.asked


def test_without_gradio_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--from", "nowhere"]) == 1
    assert (
        capsys.readouterr().err == "error: no gradio here: pip install -r requirements-demo.txt\n"
    )
    assert "gradio" in (ROOT / "requirements-demo.txt").read_text()


def test_where_it_cannot_be_served_is_told_in_a_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for host, port in (("127.0.0.1", taken), ("127.0.0.1", 70000), ("203.0.113.7", 0)):
            with pytest.raises(OSError, match=f"--host {host} --port {port}: .*; choose") as error:
                demo.check_address(host, port)
            assert len(str(error.value).splitlines()) == 1
    demo.check_address("127.0.0.1", taken)  # it is free again


@pytest.fixture
def gradio(monkeypatch):
    """A stand-in that keeps what the page is made of and how it is served."""

    class Part:
        def __init__(self, *args, **options):
            self.args, self.options = args, options
            made.append(self)
            self.change = self.load = self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def click(self, function, *args, **options):
            fake.another = options["js"]

        def queue(self, **options):
            return self

        def launch(self, **options):
            fake.launched = options

        def block_thread(self):
            raise KeyboardInterrupt

    class Error(Exception):
        def __init__(self, line, print_exception):
            super().__init__(line)

    def on(triggers, function, inputs, outputs, **options):
        fake.draw, fake.inputs = function, inputs

    made = []
    kinds = (
        "Blocks",
        "Markdown",
        "Row",
        "Column",
        "Dropdown",
        "Number",
        "Slider",
        "Button",
        "Image",
        "ImageEditor",
        "Textbox",
        "Brush",
    )
    fake = types.SimpleNamespace(**{kind: type(kind, (Part,), {}) for kind in kinds})
    fake.Error, fake.on, fake.made = Error, on, made
    fake.themes = types.SimpleNamespace(Default=lambda **options: options)
    monkeypatch.setitem(sys.modules, "gradio", fake)
    monkeypatch.setattr(demo, "check_address", lambda host, port: None)
    starlette = types.ModuleType("starlette.middleware")
    starlette.Middleware = lambda cls: cls
    monkeypatch.setitem(sys.modules, "starlette", types.ModuleType("starlette"))
    monkeypatch.setitem(sys.modules, "starlette.middleware", starlette)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")
    return fake


def test_the_page_is_for_this_machine_and_draws(gradio, monkeypatch, capsys):
    model = Model(3, "method.name=flow", "sampling.omega=2")
    monkeypatch.setattr(generator, "load", lambda source: model)
    assert demo.main(["--from", "/runs/mine/", "--columns", "4"]) == 130
    launched = gradio.launched
    assert (launched["server_name"], launched["server_port"]) == ("127.0.0.1", 7860)
    assert launched["share"] is False and launched["mcp_server"] is False
    assert demo.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "http://127.0.0.1:7860" in capsys.readouterr().out
    blocks = next(part for part in gradio.made if type(part).__name__ == "Blocks")
    assert blocks.options["analytics_enabled"] is False and blocks.options["title"] == "mine"
    assert [one.options["label"] for one in gradio.inputs] == ["Class", "Seed", "Steps", "Guidance"]
    assert model.asked == [([0] * 4 + [1] * 4 + [2] * 4, 0, 1, 2.0)]  # compiled before it is seen
    picture, _ = gradio.draw("1", 5, 2, 3.0)
    assert cells(picture, 3, 4) == [[1] * 4] * 3 and model.asked[-1][1:] == (5, 2, 3.0)
    gradio.draw(demo.EVERY, 0, 1, 1.0)
    with pytest.raises(gradio.Error, match="steps"):
        gradio.draw("1", 5, 99, 3.0)
    assert str(demo.LARGEST_SEED) in gradio.another


def test_host_and_port_are_as_told(gradio, monkeypatch):
    monkeypatch.setattr(generator, "load", lambda source: Model(3))
    assert demo.main(["--from", "x", "--host", "0.0.0.0", "--port", "80"]) == 130
    assert (gradio.launched["server_name"], gradio.launched["server_port"]) == ("0.0.0.0", 80)
    assert len(gradio.inputs) == 3  # no guidance to choose


def test_what_cannot_be_loaded_is_told_in_a_line(gradio, tmp_path, capsys):
    assert demo.main(["--from", str(tmp_path / "nowhere")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
