"""Resuming: damaged checkpoints, changed options, load_from, and numbers that go bad."""

import asyncio
import json
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import ALONE, STEPS_ALONE, Jobs, metrics

import main
import parts
import train
from configs import load_config
from formats import published
from models import dit
from run import checkpoint, layout, resume
from run import weights as weights_of
from utils import processes, sharding, train_metrics

ROWS = ("error",)


class State(typing.NamedTuple):
    """As small as a state can be."""

    step: jax.Array
    params: typing.Any
    ema_params: dict
    opt_state: typing.Any
    sums: dict


def state_of(step):
    weights = {"kernel": jnp.arange(3000.0).reshape(30, 100) + step, "bias": jnp.ones(7) * step}
    average = jax.tree.map(lambda x: x / 2, weights)
    (adam, *rest) = optax.adam(0.1).init(weights)
    # Zeros would leave files so small that the largest is one nobody reads.
    adam = (adam._replace(mu=average, nu=weights), *rest)
    return State(
        jnp.int32(step), weights, {"ema_0.98": average}, adam, train_metrics.zero_sums(ROWS)
    )


def config_of(*words):
    argv = ["--config=configs/load_config.py:digits", *[f"--config.{word}" for word in words]]
    return load_config.from_command_line(argv)[0]


@pytest.fixture
def workdir(tmp_path):
    """A run with checkpoints of steps 10, 20 and 30."""
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        for step in (10, 20, 30):
            resume.save(checkpointer, state_of(step), {"position": step}, config_of().to_dict())
    return tmp_path


def restored(workdir, config=None):
    shapes = jax.eval_shape(lambda: state_of(0))
    shardings = sharding.by_parameter(sharding.make_mesh(1), shapes)
    targets = sharding.with_shardings(shapes, shardings)
    return resume.restore((config or config_of()).to_dict(), workdir, targets, {})


def assert_is_step(found, step):
    state, place, _ = found
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(step))
    assert place == {"position": step}


# Checkpoints ----------------------------------------------------------------------------------


def test_the_newest_comes_back_as_it_was(workdir):
    assert_is_step(restored(workdir), 30)
    assert restored(workdir / "elsewhere") is None
    made = {"autoencoder": {"name": "a"}}
    with checkpoint.Checkpointer(workdir, identity=made) as checkpointer:
        resume.save(checkpointer, state_of(40), {"position": 40}, config_of().to_dict())
    assert layout.steps(workdir) == [20, 30, 40]
    assert restored(workdir).identity == made  # which only the checkpoint knows


def data_file(folder):
    """The file with the arrays of an item."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda folder: data_file(folder / "params").write_bytes(b"cut"),
    "a bit of the weights": lambda folder: flip_a_bit(data_file(folder / "params")),
    "a bit of the averages": lambda folder: flip_a_bit(data_file(folder / "ema_params")),
    "a bit of the optimizer": lambda folder: flip_a_bit(data_file(folder / "progress")),
    "an item is gone": lambda folder: shutil.rmtree(folder / "ema_params"),
    "no metadata": lambda folder: (folder / "progress" / "_METADATA").unlink(),
    "empty metadata": lambda folder: (folder / "params" / "_METADATA").write_text(""),
    "no manifest": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
    "half a config": lambda folder: (folder / "config" / "metadata").write_text("{"),
    "another place": lambda folder: (folder / "data" / "metadata").write_text('{"position": 31}'),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(workdir, kind, caplog, capfd):
    DAMAGE[kind](workdir / "checkpoints" / "30")
    no_weights = kind in ("a bit of the optimizer", "no metadata")
    assert weights_of.of_run(workdir).step == (30 if no_weights else 20)
    assert layout.steps(workdir) == [10, 20, 30]  # only the run itself may rename
    caplog.clear()
    assert_is_step(restored(workdir), 20)
    assert layout.steps(workdir) == [10, 20]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "checkpoints/30" in warning and "set aside as damaged-30" in warning
    assert len(warning.splitlines()) == 1 and "Traceback" not in capfd.readouterr().err
    with checkpoint.Checkpointer(workdir) as checkpointer:
        resume.save(checkpointer, state_of(30), {"position": 30}, config_of().to_dict())
    assert_is_step(restored(workdir), 30)
    flip_a_bit(data_file(workdir / "checkpoints" / "30" / "params"))
    assert_is_step(restored(workdir), 20)
    assert (workdir / "checkpoints" / "damaged-30-again").is_dir()


def test_a_stop_does_not_hide_that_its_checkpoint_could_not_be_written(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError("no space")

    monkeypatch.setattr(checkpoint.Checkpointer, "wait", refuse)
    for error, raised in ((processes.Preempted("which is saved"), OSError), (KeyError, KeyError)):
        with pytest.raises(raised), checkpoint.Checkpointer(tmp_path):
            raise error


def test_only_what_the_coroutines_of_orbax_drop_goes_unprinted(capfd):
    class Own:
        def __del__(self):
            raise ValueError("of our own")

    async def read():
        try:
            await asyncio.sleep(0)
        finally:
            raise ValueError("of orbax")

    checkpoint._hush()
    reading = read()
    reading.send(None)
    del reading
    Own()
    printed = capfd.readouterr().err
    assert "of our own" in printed and "of orbax" not in printed


def test_without_a_whole_checkpoint_nothing_is_renamed(workdir):
    for step in (10, 20, 30):
        DAMAGE["cut"](workdir / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"none of the checkpoints \[10, 20, 30\]") as error:
        restored(workdir)
    assert len(str(error.value).splitlines()) == 1
    assert layout.steps(workdir) == [10, 20, 30]
    with pytest.raises(checkpoint.DamagedError, match="checkpoints/30"):
        weights_of.of_run(workdir)


def test_what_a_killed_job_left_half_written_is_no_checkpoint(workdir):
    unfinished = workdir / "checkpoints" / "35.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "30", unfinished)
    assert layout.steps(workdir) == [10, 20, 30]
    assert_is_step(restored(workdir), 30)
    with checkpoint.Checkpointer(workdir) as checkpointer:
        resume.save(checkpointer, state_of(40), {"position": 40}, config_of().to_dict())
    assert layout.steps(workdir) == [20, 30, 40] and not unfinished.exists()


def test_weights_of_a_step(workdir):
    found = weights_of.of_run(workdir, 20, optimizer=True)
    expected = state_of(20)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.ema_params, expected.ema_params)
    assert found.opt_state.keys() == {"count", "mu", "nu"}
    jax.tree.map(np.testing.assert_array_equal, found.opt_state["mu"], expected.opt_state[0].mu)
    with pytest.raises(FileNotFoundError, match=r"checkpoint 15 \(found: \[10, 20, 30\]\)"):
        weights_of.of_run(workdir, 15)


def test_checksums_see_every_bit_and_no_order():
    rng = np.random.RandomState(0)
    tree = {"a": rng.normal(size=(8, 5)).astype(np.float32), "b": [np.int32(-3), np.arange(4.0)]}
    tree["b"][1] = tree["b"][1].astype(np.float32)
    (one,) = checkpoint.checksums({"x": tree}, {}).values()
    assert one == checkpoint.checksums({"x": jax.tree.map(jnp.asarray, tree)}, {})["x"]
    assert one == checkpoint.checksums({"x": list(reversed(jax.tree.leaves(tree)))}, {})["x"]
    for bit in range(0, 32, 5):
        changed = tree["a"].copy()
        changed.view(np.uint32)[3, 2] ^= 1 << bit
        assert one != checkpoint.checksums({"x": tree | {"a": changed}}, {})["x"]


# Options --------------------------------------------------------------------------------------


def test_options_that_make_it_another_run_are_refused_together(workdir):
    words = ["model.depth=2", "training.learning_rate=0.1", "training.batch_size=64"]
    words += ["method.omega=2.0", "training.ema_val=0.9,0.99", "training.seed=1"]
    with pytest.raises(ValueError) as error:
        restored(workdir, config_of(*words))
    line = str(error.value)
    for change in ("model.depth 4 -> 2", "learning_rate 0.003 -> 0.1", "omega 1.0 -> 2.0",
                   "ema_val [0.98] -> [0.9, 0.99]", "training.seed 42 -> 1"):  # fmt: skip
        assert change in line
    assert "batch_size" not in line and f"--config.load_from={workdir}" in line
    assert len(line.splitlines()) == 1
    assert layout.steps(workdir) == [10, 20, 30]


def test_harmless_changes_are_accepted_and_said(workdir, caplog):
    caplog.set_level("INFO")
    words = ["training.log_per_step=7", "training.num_steps=9999", "fid.num_samples=50"]
    words += ["training.checkpoint_per_epoch=1", "sampling.num_steps=1,2", "load_from=x"]
    assert_is_step(restored(workdir, config_of(*words)), 30)
    assert "training.log_per_step" in caplog.text and "load_from None -> x" in caplog.text
    assert "sampling.num_steps [1] -> [1, 2]" in caplog.text
    caplog.clear()
    restored(workdir, config_of("training.batch_size=64"))
    assert "128 -> 64: steps done keep their number and the data goes on" in caplog.text
    caplog.clear()
    restored(workdir)
    assert "changed" not in caplog.text


def test_an_option_that_is_newer_than_the_checkpoint_had_its_default(workdir):
    saved = json.loads(json.dumps(config_of().to_dict()))
    del saved["method"]["norm_p"], saved["load_from"]
    saved["method"]["of_old"] = 3
    resume.check_options(saved, config_of().to_dict(), workdir)
    with pytest.raises(ValueError, match=r"norm_p 1\.0 -> 0\.5"):
        resume.check_options(saved, config_of("method.norm_p=0.5").to_dict(), workdir)


# From other weights ---------------------------------------------------------------------------


@pytest.mark.parity
def test_training_goes_on_from_a_published_checkpoint(golden):
    """Its weights, average, step and Adam's moments: an update is the one that optax computes."""
    path = golden / "released_checkpoint" / "msgpack"
    weights = published.load(path)
    kernel = weights["params"]["x_embedder"]["kernel"]
    net = dit.DiT(
        depth=len(weights["params"]["blocks"]["adaLN"]["bias"]),
        hidden_size=kernel.shape[-1],
        num_heads=1,
        patch_size=kernel.shape[0],
        num_classes=len(weights["params"]["y_embedder"]["embedding"]) - 1,
    )
    shape = (8 * kernel.shape[0], 8 * kernel.shape[0], kernel.shape[2])
    config = config_of(
        "training.lr_schedule=const", "training.learning_rate=0.01", "training.warmup_steps=0"
    )
    model = parts.make(config)._replace(module=net)
    recipe, _ = train.make_recipe(config.training, model, 10)
    fresh = jax.jit(lambda key: train.init_state(recipe, net, shape, key))(jax.random.key(0))
    shardings = sharding.by_parameter(sharding.make_mesh(1), fresh)
    loaded = weights_of.load(path, fresh.params, config.dataset, optimizer=True)
    state = resume.from_weights(fresh, loaded, shardings)

    assert int(state.step) == weights["step"]
    jax.tree.map(np.testing.assert_array_equal, state.params, weights["params"])
    jax.tree.map(
        np.testing.assert_array_equal, state.ema_params, {"ema_0.98": weights["ema_params"]}
    )
    grads = jax.tree.map(lambda x: 0.01 * np.cos(x), state.params)
    updates, after = jax.jit(recipe.optimizer.update)(grads, state.opt_state, state.params)

    b1, b2, count = 0.9, 0.95, int(weights["opt_state"]["count"]) + 1
    assert count > 1, "the golden checkpoint has taken no step"

    def adam(mu, nu, g):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        return -0.01 * (mu / (1 - b1**count)) / (np.sqrt(nu / (1 - b2**count)) + 1e-8)

    moments = weights["opt_state"]
    expected = jax.tree.map(adam, moments["mu"], moments["nu"], grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)
    counts = optax.tree_utils.tree_get_all_with_path(after, "count")
    assert {int(value) for _, value in counts} == {count}


def test_load_weights_takes_a_run_with_its_optimizer(workdir):
    shapes = jax.eval_shape(lambda: state_of(0).params)
    data = config_of().dataset
    weights = weights_of.load(workdir, shapes, data, optimizer=True)
    state = state_of(0)
    shardings = sharding.by_parameter(sharding.make_mesh(1), state)
    state = resume.from_weights(state, weights, shardings)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(30))
    assert weights_of.load(workdir, shapes, data).opt_state is None


def test_averages_are_known_by_their_decays():
    emas = {f"ema_{decay}": {"kernel": jnp.full(3, decay)} for decay in (0.999, 0.9999)}
    weights = weights_of.Weights(1, {"kernel": jnp.zeros(3)}, emas, "ema_0.999")
    assert weights_of.choose(weights, "ema_0.9999") is emas["ema_0.9999"]
    assert weights_of.choose(weights, "ema") is emas["ema_0.999"]
    with pytest.raises(ValueError, match=r"'ema_0.5' is none of params, ema, ema_0.999, ema_0.9"):
        weights_of.choose(weights, "ema_0.5")
    names = ("ema_0.9999", "ema_0.5", "ema_0.999", "ema_sigma0.05")
    state = State(jnp.int32(0), weights.params, dict.fromkeys(names, weights.params), (), {})
    shardings = sharding.by_parameter(sharding.make_mesh(1), state)
    found = resume.from_weights(state, weights, shardings).ema_params
    begun = np.float32([0.9999, 0.999, 0.999, 0])
    np.testing.assert_array_equal([found[name]["kernel"][0] for name in names], begun)


def test_averages_that_were_written_as_a_list_have_names(tmp_path):
    """Until 2026-11-30 they were known by their place: those of decays first, then profiles."""
    words = ["training.ema_val=0.99,0.9", "training.ema_sigma=0.1,0.05", "training.num_steps=10"]
    names, config = ("ema_0.99", "ema_0.9", "ema_sigma0.1", "ema_sigma0.05"), config_of(*words)
    listed = [jax.tree.map(lambda x, i=i: x + i, state_of(10).params) for i in range(4)]
    state = state_of(10)._replace(ema_params=listed)
    for workdir in (tmp_path / "old", tmp_path / "new"):
        with checkpoint.Checkpointer(workdir) as checkpointer:
            resume.save(checkpointer, state, {"position": 10}, config.to_dict())
        state = state._replace(ema_params=dict(zip(names, listed, strict=True)))
        weights = weights_of.of_run(workdir)
        assert weights.ema == "ema_0.99"
        jax.tree.map(np.testing.assert_array_equal, weights.ema_params, state.ema_params)
        shapes = jax.eval_shape(lambda state=state: state)
        shardings = sharding.by_parameter(sharding.make_mesh(1), shapes)
        targets = sharding.with_shardings(shapes, shardings)
        found = resume.restore(config.to_dict(), workdir, targets, {}).state
        jax.tree.map(np.testing.assert_array_equal, found, state)


def test_the_decays_are_those_of_the_run(workdir):
    shapes = jax.eval_shape(lambda: state_of(0).params)
    weights = weights_of.load(workdir, shapes, config_of().dataset)
    assert weights.ema_params.keys() == {"ema_0.98"} and weights.ema == "ema_0.98"


# Numbers that go bad --------------------------------------------------------------------------


def test_a_run_with_nonfinite_numbers_ends_and_keeps_its_checkpoints(tmp_path, capsys):
    jobs = Jobs(tmp_path)
    workdir = tmp_path / "run"
    jobs.run_here(workdir, STEPS_ALONE | {"training.num_steps": 8})
    whole = weights_of.of_run(workdir)
    assert whole.step == 8
    shutil.move(workdir, tmp_path / "good")
    other = STEPS_ALONE | {"training.learning_rate": 1e30, "load_from": tmp_path / "good"}
    capsys.readouterr()
    assert main.main([*jobs.command(workdir, other)[2:], ALONE]) == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    # Step 9 makes the weights infinite in norm; it is noticed at the next line of the log.
    assert line.startswith("error: step 9: ") and "param_norm" in line and "not finite" in line
    assert layout.steps(workdir) == []
    assert all(step["step"] < 9 for step in metrics(workdir))
    skipping = {**other, "training.skip_nonfinite": True, "training.num_steps": 12}
    jobs.run_here(workdir, skipping)
    found = weights_of.of_run(workdir)
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    lines = [line for line in metrics(workdir) if "learning_rate" in line]
    assert [line["skipped_steps"] for line in lines] == [1, 3]
    assert not any("loss" in line for line in lines)  # no step was taken: there is no mean
    text = capsys.readouterr().out
    assert "1 steps left out: not finite" in text and "3 steps left out: not finite" in text
