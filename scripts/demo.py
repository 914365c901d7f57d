"""A page in the browser that draws images of a trained network: class, seed, steps, guidance.

    python -m scripts.demo --from WORKDIR [--host ADDRESS] [--port NUMBER]

WORKDIR is a run's folder, a published or an exported checkpoint. The page is served to this machine
alone unless --host says otherwise (0.0.0.0: to the whole network, without a password). It needs
`pip install -r requirements-demo.txt`. Nothing is sent or loaded from elsewhere. docs/python.md.
"""

import logging
import os
import socket
import sys
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils import commands, files, signals
from utils import images as image_utils

MOST_STEPS = 32
LARGEST_SEED = 2**31 - 1
EVERY = "every class"
CANVAS = 256  # pixels of the longer side of what is painted on
# The browser is told to load nothing from elsewhere, whatever the page asks for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
CSS = "#grid img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain }"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


class Controls(NamedTuple):
    """What can be chosen for a network, and where it begins."""

    classes: int  # 0: there are none to choose from
    rows: int  # of the grid, which has as many images whatever is chosen
    columns: int
    num_steps: int  # at the start
    omega: tuple[float, float] | None  # (at the start, largest); None: guidance is trained in
    conditions: tuple = ()  # those that come with the data, of `utils.conditions.Condition`


def controls(model, columns):
    """Returns the `Controls` of a `generator.Generator`, for a grid of `columns`."""
    import sample

    config, omega = model.config, None
    largest = config.method.omega_max
    if model.parts.method.guided_at_sampling and model.num_classes and largest > 1:
        start = float(next(iter(config.sampling.omega), 1.0))
        omega = (start, max(start, float(largest)))
    rows = min(model.num_classes or sample.GRID_CLASSES, sample.GRID_CLASSES)
    num_steps = min(config.sampling.num_steps[0], MOST_STEPS)
    return Controls(model.num_classes, rows, columns, num_steps, omega, tuple(model.conditions))


def answer(model, offered, label=None, seed=0, num_steps=1, omega=None, given=()):
    """Draws a grid of images, and tells a line about it.

    Args:
      model: `generator.Generator`.
      offered: its `Controls`.
      label: a class, or None: a row for each of at most ten classes.
      seed: of the noise, which is the same for every class.
      num_steps: network evaluations.
      omega: guidance scale; does not count where none is offered.
      given: what is given of each of `offered.conditions`, see `condition`; None: nothing.

    Returns:
      uint8 (H, W, 3), and text.

    Raises:
      ValueError: a choice that is none.
    """
    import sample

    whole = {"class": (label or 0, max(offered.classes - 1, 0)), "seed": (seed, LARGEST_SEED)}
    for name, (value, most) in (whole | {"steps": (num_steps, MOST_STEPS)}).items():
        least = 1 if name == "steps" else 0
        if not _is_number(value) or value != int(value) or not least <= value <= most:
            raise ValueError(f"{name}: a whole number from {least} to {most}, not {value!r}")
    if not offered.omega:
        omega = None
    elif not _is_number(omega) or not 0 < omega <= offered.omega[1]:
        raise ValueError(f"guidance: a number above 0, up to {offered.omega[1]:g}, not {omega!r}")
    classes = np.arange(offered.rows) * offered.classes // offered.rows
    labels = np.repeat(classes if label is None else [int(label)] * offered.rows, offered.columns)
    given = given or (None,) * len(offered.conditions)
    made = {
        one.name: condition(one, value, model)
        for one, value in zip(offered.conditions, given, strict=True)
    }
    more = {name: value for name, value in made.items() if value is not None}
    began = time.perf_counter()
    images = model.sample(
        labels, seed=int(seed), num_steps=int(num_steps), omega=omega,
        **({"conditions": more} if more else {}),
    )  # fmt: skip
    took = 1000 * (time.perf_counter() - began)
    picture = sample.picture(images, offered.columns)
    evaluations = "one evaluation" if num_steps == 1 else f"{int(num_steps)} evaluations"
    line = f"{len(labels)} images in {took:,.0f} ms: {evaluations} of the network for each"
    return np.broadcast_to(picture, (*picture.shape[:2], 3)), line


def condition(one, value, model):
    """Makes a condition of what a person gives, or None for nothing, where it may be dropped.

    Args:
      one: `utils.conditions.Condition`.
      value: of an array a picture uint8 (H, W) or (H, W, C), cut and scaled to its size; else a
        text of its numbers, one for all or all of them.
      model: `generator.Generator`, which encodes pictures where the condition is a latent.

    Raises:
      ValueError: numbers that are none, or too few or many.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        kept = np.zeros(one.shape, np.uint8 if one.dtype == "uint8" else np.float32)
        return kept if one.kept else None
    if one.kind == "array":
        h, w, c = model.decode(np.zeros((1, *one.shape))).shape[1:] if one.latent else one.shape
        array = image_utils.fitted(_cut(value, h, w, c)[None], (h, w, c))[0]
        if one.latent:
            return model.encode(array[None])[0]
        return array if one.dtype == "uint8" else array / np.float32(255)
    try:
        numbers = np.array([float(word) for word in value.replace(",", " ").split()], np.float32)
        return np.broadcast_to(numbers.reshape(one.shape if numbers.size > 1 else ()), one.shape)
    except ValueError:
        count = int(np.prod(one.shape))
        raise ValueError(f"{one.name}: {count} numbers with commas, or one for all") from None


def _cut(picture, h, w, c):
    """Scales a picture so that it fills (h, w), and cuts out the middle: uint8 (h, w, 1 or 3)."""
    picture = Image.fromarray(picture).convert("L" if c == 1 else "RGB")
    scale = max(h / picture.height, w / picture.width)
    width, height = (
        max(round(side * scale), m) for side, m in zip(picture.size, (w, h), strict=True)
    )
    left, top = (width - w) // 2, (height - h) // 2
    picture = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture.crop((left, top, left + w, top + h))).reshape(h, w, -1)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)


def label_of(choice):
    """Turns the class of the page into a number, or None: every class."""
    return None if choice in (None, EVERY) else int(choice)


def check_address(host, port):
    """Raises OSError in a line where a page cannot be served at an address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"--host {host} --port {port}: {reason}; choose another") from None


# With gradio, which is asked for here alone -----------------------------------------------------


def page(gradio, model, offered, title):
    """Returns the page as a `gradio.Blocks`."""

    def draw(choice, seed, num_steps, *more):
        omega, *given = more if offered.omega else (None, *more)
        given = [value["composite"] if isinstance(value, dict) else value for value in given]
        try:
            return answer(model, offered, label_of(choice), seed, num_steps, omega, given)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(60, 60)) as blocks:
        gradio.Markdown(
            f"# {title}\nWeights of step {model.step:,}. A seed is one noise, for whatever class."
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                choices = [EVERY, *map(str, range(offered.classes))]
                inputs = [
                    gradio.Dropdown(choices, value=EVERY, label="Class", visible=len(choices) > 2),
                    gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED),
                    gradio.Slider(1, MOST_STEPS, offered.num_steps, step=1, label="Steps"),
                ]
                if offered.omega:
                    start, largest = offered.omega
                    inputs.append(gradio.Slider(1, largest, start, step=0.1, label="Guidance"))
                inputs += [_input(gradio, one) for one in offered.conditions]
                another = gradio.Button("Other noise", variant="primary")
            with gradio.Column(scale=2):
                grid = gradio.Image(
                    format="png", label="Images", show_label=False, elem_id="grid", height="72vh",
                    buttons=["download", "fullscreen"], interactive=False,
                )  # fmt: skip
                line = gradio.Markdown()
        # In the browser: the seed that changes is what asks for the images.
        another.click(None, None, inputs[1], js=f"() => Math.floor(Math.random() * {LARGEST_SEED})")
        gradio.on(
            [blocks.load, *(one.change for one in inputs)], draw, inputs, [grid, line],
            trigger_mode="always_last", show_progress="hidden", api_name="draw",
        )  # fmt: skip
    return blocks


def _input(gradio, one):
    """Makes the input of a condition: a picture, uploaded or painted, or a line of numbers."""
    if one.kind != "array":
        return gradio.Textbox(label=f"{one.name} {one}", placeholder="numbers, or one for all")
    height, width = (max(1, CANVAS // max(one.shape[:2])) * side for side in one.shape[:2])
    return gradio.ImageEditor(
        label=one.name, type="numpy", image_mode="L" if one.shape[2] == 1 else "RGB",
        sources=("upload", "clipboard"), canvas_size=(width, height), layers=False,
        brush=gradio.Brush(colors=["#ffffff", "#808080", "#000000"], color_mode="fixed"),
    )  # fmt: skip


def serve(gradio, blocks, host, port):
    """Serves the page until it is interrupted."""
    from starlette.middleware import Middleware

    theme = gradio.themes.Default(primary_hue="blue", **FONTS)
    blocks.queue(max_size=32, default_concurrency_limit=1).launch(
        server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
        show_error=True, ssr_mode=False, mcp_server=False, enable_monitoring=False,
        footer_links=[], theme=theme, css=CSS, prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(_Policy)]},
    )  # fmt: skip
    print(f"http://{host}:{port}", flush=True)
    blocks.block_thread()


class _Policy:
    """Says POLICY with every answer (ASGI)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with(message):
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", POLICY.encode()))
            await send(message)

        await self.app(scope, receive, send_with if scope["type"] == "http" else send)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = commands.parser("scripts.demo", __doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="WORKDIR",
                        help="a run's folder, or a checkpoint")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument("--columns", type=int, default=8, choices=range(1, 17), metavar="N",
                        help="images in a row of the grid, 1 to 16 (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    # Before the import, for gradio asks then: no word of this page goes anywhere.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio
    except ImportError:
        print("error: no gradio here: pip install -r requirements-demo.txt", file=sys.stderr)
        return 1
    try:
        check_address(args.host, args.port)
        import generator

        model = generator.load(args.source)
        offered = controls(model, args.columns)
        print("compiling", flush=True)
        answer(model, offered, None, 0, offered.num_steps, offered.omega and offered.omega[0])
        title = os.path.basename(os.path.abspath(args.source))
        serve(gradio, page(gradio, model, offered, title), args.host, args.port)
    except (ValueError, OSError) as error:
        print(f"error: {files.line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
