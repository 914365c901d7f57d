"""The benchmark, and the cost of a step that it counts."""

import argparse
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make
import numpy as np
import plain as plain_losses
import pytest

import parts
import train
from benchmarks import __main__ as measure
from benchmarks import check, costs, hlo, hosts, stand_ins, waits
from benchmarks import plain as published_form
from models import vae
from utils import chips, images, pictures

ROOT = Path(__file__).parents[1]
TINY = (
    "--config=configs/load_config.py:digits --config.model.depth=1 --config.model.hidden_size=32 "
    "--config.training.batch_size=8 --config.fid.device_batch_size=8"
).split()


def get_config(*options):
    return costs.config_without_data(["--config=configs/load_config.py:run_b4", *options])[0]


def plain_step(recipe, key):
    """A step as published, of the project's network: 6 F."""

    def net(params, *batches, jvp=None):
        return recipe.net(recipe.gather(params), *batches, jvp=jvp)

    return partial(published_form.step, recipe, net, key, loss=plain_losses.loss)


def count(config, plain):
    """FLOPs of a step by XLA."""
    model, key = parts.make(config), jax.random.key(0)
    recipe, _ = train.make_recipe(config.training, model, 1)
    recipe = costs.countable(recipe, model)
    step = plain_step(recipe, key) if plain else partial(train.train_step, recipe, key)
    state = costs.state_shapes(model, recipe)
    return costs.counted_flops(step, state, costs.batch_shapes(config))


def test_train_where_xla_counts_nothing(tmp_path, monkeypatch, capsys):
    """As on every GPU and TPU: jax does not ask their backends for the cost of a program."""
    from jax._src.interpreters import pxla

    monkeypatch.setattr(pxla.xb, "using_pjrt_c_api", lambda backend: True)
    assert jax.jit(jnp.sin).lower(1.0).cost_analysis() is None
    file = tmp_path / "results.json"
    few = ["--steps=1", "--rounds=1", "--warmup=1", f"--json={file}"]
    assert measure.main(["train", *TINY, *few]) == 0
    results = json.loads(file.read_text())
    assert results["GFLOP/image, XLA"] is None and results["GFLOP/image, needed"] > 0
    assert results["images/s"] == pytest.approx(8e3 / results["ms/step"])
    assert results["MFU"] is None  # of a CPU no peak is known
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_the_kernels_of_a_card_are_checked():
    """What `check` runs on a card, with the operations that stand in for its kernels here."""
    errors = check.attention_errors((1, 64, 2, 24), fused=False, seed=0)
    assert all(0 < errors[name] <= most for name, most in check.LARGEST.items())
    assert check.distance(np.array([np.nan]), np.ones(1)) != 0  # NaN passes no comparison


def test_all_rows_of_a_card_are_commands(tmp_path):
    """benchmarks/gpu.sh, with a `python3` that writes down what it is asked for."""
    (tmp_path / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$LIST"\nexit 1\n')
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "LIST": str(tmp_path / "list")}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path, "--steps=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = (tmp_path / "list").read_text().splitlines()
    assert done.returncode == 0 and done.stdout.count("status 1") == len(lines) == 6
    for line in lines:  # each is understood, up to what it would run
        command, *words = line.removeprefix("-m benchmarks ").split()
        assert words[-2:] == ["--json", str(tmp_path / Path(words[-1]).name)]
        module, _ = measure.COMMANDS[command]
        module.add_arguments(parser := argparse.ArgumentParser())
        parser.add_argument("--json")
        rest = words if module in measure.WITHOUT_CONFIG else costs.config_without_data(words)[1]
        parser.parse_args(rest)


@pytest.mark.parametrize("half_precision", ["false", "true"])
def test_a_step_takes_three_quarters_of_the_plain_one(half_precision):
    config = get_config(f"--config.training.half_precision={half_precision}")
    ours, published = count(config, plain=False), count(config, plain=True)
    assert ours <= 0.76 * published, ours / published
    by_hand = parts.make(config).module.flops((32, 32, 4)) * 256
    assert parts.make(config).method.passes(256) == 4.5
    # XLA also counts what is not a product, a few percent.
    assert 1 < ours / (4.5 * by_hand) < 1.03
    assert 1 < published / (6 * by_hand) < 1.03


@pytest.mark.parametrize(
    "options, passes",
    [
        ({}, 4.5),
        ({"kappa": 0.0, "omega": 2.0}, 4.25),
        ({"guidance_eq": "none"}, 3.25),
        ({"kappa": 0.0, "omega": 1.0}, 3.25),
        ({"data_proportion": 0.0}, 6.0),
        ({"data_proportion": 1.0}, 4.0),
    ],
)
def test_forward_passes(options, passes):
    assert make.method(**options).passes(16) == passes


@pytest.mark.slow
def test_the_plain_step_learns_the_same():
    """Both candidates move the parameters alike, so that a comparison means something."""
    options = ["--config.training.learning_rate=1", "--config.training.warmup_steps=0"]
    config = costs.config_without_data([*TINY, *options])[0]
    model, key = parts.make(config), jax.random.key(0)
    recipe, _ = train.make_recipe(config.training, model, 1)
    init = partial(train.init_state, recipe, model.module, model.image_shape)
    state = jax.jit(init)(key)
    batch = stand_ins.random_values(costs.batch_shapes(config))
    ours = jax.jit(partial(train.train_step, recipe, key))(state, batch)
    published = jax.jit(plain_step(recipe, key))(state, batch)
    averages = ours.ema_params, published.ema_params, state.params
    for a, b, start in zip(*map(jax.tree.leaves, averages), strict=True):
        moved = jnp.abs(a - start).max()
        assert jnp.abs(a - b).max() <= 0.01 * moved + 1e-6
    assert published.step == ours.step == 1


def test_evaluation_by_stage(tmp_path):
    file = tmp_path / "results.json"
    assert measure.main(["evaluation", *TINY, "--rounds=1", f"--json={file}"]) == 0
    results = json.loads(file.read_text())
    assert set(results) == {"sampling", "decoding", "features", "whole"}
    assert min(results.values()) > 0


def test_stand_ins_have_the_shapes_of_the_real_networks():
    config = get_config("--config.fid.device_batch_size=2")
    evaluator = stand_ins.evaluator(config, parts.make(config))
    assert evaluator.score.image_shape == (256, 256, 3)
    autoencoder = evaluator.autoencoder
    number = sum(x.size for x in jax.tree.leaves(autoencoder.params))
    assert number == 83_653_863  # of stabilityai/sd-vae-ft-mse
    stages = stand_ins.stages(evaluator)
    assert stages["whole"][0] == evaluator.step
    found = jax.eval_shape(*[stages["features"][0], *stages["features"][1]])
    assert found["pool"].shape == (2, 2048)
    assert autoencoder.downscale == 8 and isinstance(autoencoder, vae.Autoencoder)


@pytest.mark.parametrize(
    "words",
    [
        ["train", *TINY, "--config.training.batch=8"],
        ["train", *TINY, "--json=no/such/folder/file"],
        ["data", "--num_records=10"],
    ],
)
def test_a_wrong_option_is_one_line(words, capsys):
    assert measure.main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "kind, peak, memory",
    [
        ("TPU v4", 275e12, 32),
        ("TPU v5 lite", 197e12, 16),
        ("TPU v5e", 197e12, 16),
        ("TPU v5", 459e12, 95),
        ("TPU7x", 1153.5e12, 96),  # two devices a chip
        ("NVIDIA A100-PCIE-40GB", 312e12, 40),
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA H100 PCIe", 756e12, 80),
        ("NVIDIA H100 NVL", 835e12, 94),
        ("NVIDIA H200", 989e12, 141),
        ("NVIDIA H200 NVL", 835e12, 141),
        ("NVIDIA B200", 2250e12, 180),
    ],
)
def test_what_a_device_offers(kind, peak, memory):
    found = chips.chip(SimpleNamespace(device_kind=kind))
    assert (found.peak, found.memory) == (peak, memory * 2**30)


@pytest.mark.parametrize(
    "kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H200 MIG 3g.71gb", "NVIDIA H20", "cpu"]
)
def test_of_a_slice_of_a_card_no_rate_is_known(kind):
    assert chips.chip(SimpleNamespace(device_kind=kind)) is None


def test_cores_share_a_chip():
    """Of a v4 that is compiled ahead each core is a device; where it runs, a chip is one."""
    places = [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)]
    cores = [SimpleNamespace(device_kind="TPU v4", coords=place) for place in places]
    assert chips.chip(cores[0], cores)[1:3] == (137.5e12, 16 * 2**30)
    assert chips.chip(cores[0], cores[::2])[1:3] == (275e12, 32 * 2**30)
    cores = [SimpleNamespace(device_kind="TPU7x", coords=place) for place in places]
    assert chips.chip(cores[0], cores)[1:3] == chips.chip(cores[0])[1:3] == (1153.5e12, 96 * 2**30)


# Compiled programs ----------------------------------------------------------------------------

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %q = f32[16]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
}
"""


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    assert hlo.collectives(hlo.parse(PROGRAM)) == {
        "all-reduce": (1, 16 * 4),
        "all-gather": (1 + 12, 8 * 4 + 12 * 8 * 4 * 2),
    }


def test_sides_take_turns_and_are_held_against_this_version(monkeypatch, capsys):
    order = []

    def program(name, checkout, python, folder):
        order.append(name)
        return {"whole": 6.0 + len(order)} if name == "ours" else {"whole": 3.0, "memory": 1.5}

    monkeypatch.setattr(hosts, "program", program)
    sides = {"now": ("ours", hosts.ROOT, "python"), "beside": ("theirs", hosts.ROOT, "python")}
    found = hosts.measured(sides, 2, "folder")
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert found == {
        "now": {"whole": [7.0, 10.0]},
        "beside": {"whole": [3.0, 3.0], "memory": [1.5, 1.5]},
    }
    hosts.report("a row", found)
    assert "8.500 [7.000 to 10.000] s" in (out := capsys.readouterr().out)
    assert "now / beside 2.83" in out and "[1.500 to 1.500] GB\n" in out


@pytest.mark.parametrize("size", [(500, 375), (600, 900), (256, 256)])
def test_the_loop_beside_it_makes_the_same_pixels(size, tmp_path):
    hosts.pictures(np.random.default_rng(0), tmp_path / "in", 1, size, "jpg")
    file = tmp_path / "in" / "00000.jpg"
    assert waits.adm_crop(file) == images.center_crop(pictures.read(file), 256).tobytes()


def test_every_side_of_a_row_is_a_program(tmp_path):
    for _, ours, theirs, _ in hosts.ROWS.values():
        assert all(
            name in hosts.PYTORCH or callable(getattr(waits, name)) for name in (ours, *theirs)
        )
    hosts.plain_lmdb(tmp_path / "lmdb", 20)
    assert waits.lmdb_latents(tmp_path)["a batch"] > 0
