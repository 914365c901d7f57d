"""Speed of the evaluation by stage, with made-up weights, and beside the plain feature network.

    python -m scripts.benchmark eval --config=configs/load_config.py:NAME [--devices 1 2 4]

`--devices` also measures the whole on that many CPU devices, each time in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import load_config
from scripts import stand_ins
from utils import sharding


def add_arguments(parser):
    """The options of `run`."""
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--devices", type=int, nargs="*", default=[], help="numbers of CPU devices")
    parser.add_argument("--plain", action="store_true", help="also the plain feature network")
    parser.add_argument("--json", help="also write the results to this file")


def run(config, args):
    """Measures, prints a table; returns {stage: images per second}."""
    mesh = sharding.make_mesh(config.mesh.fsdp)
    parts = stand_ins.evaluation(config, mesh)
    batch_size = config.fid.device_batch_size * mesh.size
    compiled = {}
    for name, (function, arguments) in stand_ins.stages(config, parts, batch_size).items():
        compiled[name] = prepare(function, arguments, batch_size, mesh)
    if args.plain:
        compiled["plain features"] = plain_features(parts, batch_size, mesh)
    rates = {name: [] for name in compiled}
    for _ in range(args.rounds):
        for name, (function, arguments) in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            rates[name].append(batch_size / (time.perf_counter() - begin))
    results = {name: float(np.median(rate)) for name, rate in rates.items()}
    results |= {f"whole, {n} CPU devices": on_devices(config, args, n) for n in args.devices}
    print(f"{config.model.cls}, {mesh.size} x {jax.devices()[0].device_kind}, images per second")
    for name, rate in results.items():
        print(f"  {name:24} {rate:10.2f}   {rate / results['whole']:8.2f} x the whole")
    return results


def prepare(function, arguments, batch_size, mesh):
    """The compiled function, already run once, and its arguments on the devices."""
    rows, everywhere = sharding.by_row(mesh), sharding.replicated(mesh)

    def placed(x):
        return rows if x.ndim and x.shape[0] == batch_size else everywhere

    shardings = jax.tree.map(placed, arguments)
    values = sharding.place(stand_ins.random_values(arguments), shardings)
    function = jax.jit(function, in_shardings=shardings)
    jax.block_until_ready(function(*values))
    return function, values


def plain_features(parts, batch_size, mesh):
    """The plain Flax port of the FID network in the tests, with the same resize."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import plain_inception

    net = plain_inception.PlainInception()
    images = jax.ShapeDtypeStruct((batch_size, *parts.image_shape), jnp.uint8)
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)

    def function(params, images):
        x = jax.image.resize(images.astype(jnp.float32), (len(images), 299, 299, 3), "bilinear")
        return net.apply(params, (x - 128) / 128)

    return prepare(function, (params, images), batch_size, mesh)


def on_devices(config, args, count):
    """Images per second of the whole on `count` CPU devices."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"--config.{path}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
            for path, v in load_config.options(config).items()
            if v is not None
        ]
        done = subprocess.run(
            [sys.executable, "-m", "scripts.benchmark", "eval", f"--json={folder}/results",
             f"--rounds={args.rounds}", "--config=configs/load_config.py:default", *options],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)},
            capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"--devices {count}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(Path(folder, "results").read_text())["whole"]
