"""Runs of pixel MeanFlow: their moments by Muon, resumed, exported, begun with and sampled from."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jobs import STEPS_ALONE, Jobs, checkpoints
from parity.test_pixel import Golden

import generator
import parts
import train
from formats import published, published_imf, published_pmf
from run import checkpoint, resume
from run import weights as weights_of
from scripts import export_checkpoint
from utils import moments, sharding, trees

PMF = ["model.cls=pmfDiT", *make.SIZES, "model.depth=2", "model.aux_head_depth=1"]
PMF += ["method.name=pixel", "training.ema_val=", "training.ema_half_life=2000,500"]
MUON = "training.optimizer=muon"
STEP = 20


def begun(*words):
    """The config of a run, its parts, and its state after some steps: random, none of it zero."""
    config = make.config(*make.PIXELS, *words)
    model = parts.make(config)
    recipe, _ = train.make_recipe(config.training, model, 100)
    params = make.params(model.module, model.image_shape)
    state = train.fresh_state(recipe, params)
    update = jax.jit(recipe.optimizer.update)
    opt_state = state.opt_state
    for scale in (0.3, -0.1):
        _, opt_state = update(jax.tree.map(lambda p, s=scale: s + p, params), opt_state, params)
    averages = {
        name: jax.tree.map(lambda p, i=i: p * (2 + i), tree)
        for i, (name, tree) in enumerate(state.ema_params.items())
    }
    state = state._replace(step=jnp.int32(STEP), ema_params=averages, opt_state=opt_state)
    return config, model, recipe, state


def saved(folder, *words):
    config, model, recipe, state = begun(*words)
    with checkpoint.Checkpointer(folder) as checkpointer:
        resume.save(checkpointer, state, {"position": STEP}, config.to_dict())
    return config, model, recipe, state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a checkpoint, and what it holds."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *saved(folder, *PMF, MUON)


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def fresh(model, recipe):
    """A fresh state and its shardings."""
    state = train.fresh_state(recipe, make.params(model.module, model.image_shape, 0.5))
    return state, sharding.by_parameter(model.mesh, state)


def test_the_state_of_muon_comes_back_bit_by_bit(run):
    folder, config, model, recipe, state = run
    targets = jax.eval_shape(lambda: fresh(model, recipe)[0])
    targets = sharding.with_shardings(targets, sharding.by_parameter(model.mesh, targets))
    found = resume.restore(config.to_dict(), folder, targets, {}).state
    assert_equal(found, state)
    assert np.any(found.opt_state[-1].inner_states["muon"].inner_state[0].mu["blocks"]["attn"][
        "qkv"]["kernel"])  # fmt: skip


def adopted(config, model, recipe, path):
    """The state of a run that begins with the weights at `path`, by `load_from`."""
    state, shardings = fresh(model, recipe)
    weights = resume.load(path, config.dataset, state.params, config.to_dict(), {})
    return jax.device_get(resume.from_weights(state, weights, shardings))


def test_a_run_goes_on_with_the_moments_of_another(run, tmp_path, caplog):
    folder, config, model, recipe, state = run
    found = adopted(config, model, recipe, folder)
    for name in ("params", "ema_params", "opt_state"):
        expected = getattr(state, name)
        if name == "opt_state":  # its counts are set to the step of the run anyway
            expected = moments.put(fresh(model, recipe)[0].opt_state, moments_of(expected))
        assert_equal(getattr(found, name), expected)
    # Of another optimizer nothing is taken, and that is said.
    *others, adam = saved(tmp_path / "adam", *PMF)
    for made, path in (((config, model, recipe), tmp_path / "adam"), (others, folder)):
        caplog.clear()
        found = adopted(*made, path)
        assert "another optimizer's" in caplog.text and found.step == STEP
        assert not any(np.any(leaf) for leaf in optimizer_arrays(found.opt_state))
    caplog.clear()
    found = adopted(*others, tmp_path / "adam")
    assert not caplog.records and found.opt_state[-1][0].count == 2
    assert_equal(found.opt_state[-1][0], jax.device_get(adam.opt_state[-1][0]))


def optimizer_arrays(opt_state):
    return [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim and leaf.shape != (3,)]


def moments_of(opt_state):
    """What `moments.find` makes of a state on disk, from the state itself."""
    inner = opt_state[-1].inner_states
    (muon, *_), (adam, *_) = (inner[name].inner_state for name in ("muon", "adam"))
    return moments.find([muon._asdict(), adam._asdict()])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    assert export_checkpoint.main(["--from", str(run[0]), "--to", str(folder)]) == 0
    return folder


def test_the_published_form_holds_all_of_a_run(run, exported):
    folder, config, model, recipe, state = run
    path = exported / f"checkpoint_{STEP}"
    names = trees.flatten(published_imf.structure(path))
    assert {name.split("/")[0] for name in names} == {"step", "params", "ema_params", "opt_state"}
    assert {name.split("/")[1] for name in names if name.startswith("ema_params/")} == {
        "500", "2000"
    }  # fmt: skip
    ours, theirs = weights_of.of_run(folder, optimizer=True), weights_of.read(exported, True)
    assert theirs.step == STEP and theirs.ema == "ema_half2000" == ours.ema
    for name in ("params", "ema_params", "opt_state"):
        assert_equal(getattr(theirs, name), getattr(ours, name))
    assert_equal(
        adopted(config, model, recipe, exported).opt_state,
        adopted(config, model, recipe, folder).opt_state,
    )


def test_the_export_goes_round(run, exported, tmp_path, capsys):
    argv = ["--from", str(exported), "--to", str(tmp_path)]
    assert export_checkpoint.main(argv) == 0
    first, second = (published_pmf.load(published_imf.find(f)) for f in (exported, tmp_path))
    assert_equal(first, second)
    assert export_checkpoint.main(argv) == 1 and "is there already" in capsys.readouterr().err
    assert export_checkpoint.main([*argv, "--format=msgpack"]) == 1
    assert "orbax alone" in capsys.readouterr().err
    make.run(tmp_path / "decays", *PMF[:-2])
    argv[1] = str(tmp_path / "decays")
    assert export_checkpoint.main(argv) == 1
    assert "goes by a half-life" in capsys.readouterr().err


def test_what_knows_adam_alone_is_written_a_fresh_one(tmp_path):
    """MeanFlow's published code has no Muon."""
    *_, state = saved(tmp_path / "run", *make.NETWORKS["DiT"], MUON)
    argv = ["--from", str(tmp_path / "run"), "--to", str(tmp_path / "out")]
    assert export_checkpoint.main(argv) == 0
    found = published.load(tmp_path / "out")
    assert_equal(found["params"], jax.device_get(state.params))
    assert found["opt_state"]["count"] == 0 and not jax.tree.reduce(
        lambda any_, a: any_ or np.any(a), found["opt_state"]["mu"], False
    )


def test_a_generator_of_each_form_draws_the_same(run, exported, tmp_path):
    folder, *_, state = run
    argv = ["--from", str(folder), "--to", str(tmp_path / "hf"), "--format=safetensors"]
    assert export_checkpoint.main(argv) == 0
    options = [word for word in [*make.PIXELS, *PMF] if not word.startswith("training")]
    models = [
        generator.load(folder),
        generator.load(tmp_path / "hf"),
        generator.load(exported, *options, config="default"),
    ]
    images = [model.sample([0, 1, 2], omega=2.0, output="float") for model in models]
    assert np.ptp(images[0]) > 0
    for other in images[1:]:
        np.testing.assert_array_equal(other, images[0])
    # One step is the network's image itself, for t = 1 and h = 1.
    noise = models[0].noise(3)
    u = models[0].u(noise, 1.0, 1.0, [0, 1, 2], omega=2.0)
    np.testing.assert_allclose(images[0], noise - u, atol=1e-5)
    params = generator.load(exported, *options, config="default", average="ema_half500").params
    assert_equal(jax.device_get(params), jax.device_get(state.ema_params["ema_half500"]))


@pytest.mark.parity
def test_a_run_begins_with_a_published_checkpoint(tmp_path):
    """Of other classes, and without the head of v as it is released for sampling."""
    golden = Golden()
    tree = {k: a for k, a in golden.below("params").items() if not k.startswith("net/v_")}
    path = tmp_path / "checkpoint_9"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"ema_params": {"1000": trees.unflatten(tree)}})
    ours = published_pmf.from_published(trees.unflatten(golden.below("params")), "golden")
    found = weights_of.read(tmp_path, optimizer=True)
    assert found.params is None and found.opt_state is None and found.ema == "ema_half1000"
    arrays = trees.flatten(ours)
    patch, heads = arrays["embedding/x_embedder/kernel"], arrays["u_blocks/attn/q_norm"]
    D, count = arrays["embedding/class_tokens"].shape[1], len(heads)
    tokens = len(arrays["embedding/positions"]) - sum(published_imf.PREFIX.values())
    words = [
        "model.cls=pmfDiT", f"model.hidden_size={D}", f"model.num_heads={D // heads.shape[1]}",
        f"model.patch_size={patch.shape[0]}", f"model.aux_head_depth={count}",
        f"model.depth={count + len(arrays['blocks/norm1'])}", "method.name=pixel",
        f"dataset.image_size={patch.shape[0] * round(tokens**0.5)}", "dataset.image_channels=3",
        "dataset.vae=none", "dataset.num_classes=2", f"init_from={tmp_path}",
    ]  # fmt: skip
    config = make.config(*words)
    module = parts.make(config).module
    new = jax.tree.map(lambda a: np.full(a.shape, 7, a.dtype), parts.make(config).param_shapes())
    params, line = make.begin(config, module, new)
    table = params["embedding"]["y_embedder"]["embedding"]
    assert np.all(table[:-1] == 7) and "but for the row of none" in line
    np.testing.assert_array_equal(table[-1], arrays["embedding/y_embedder/embedding"][-1])
    assert_equal(params["u_blocks"], ours["u_blocks"])
    assert all(np.all(a == 7) for a in jax.tree.leaves(params["v_blocks"])) and "v_blocks" in line


@pytest.mark.slow
def test_interrupted_is_uninterrupted(tmp_path):
    """A run by Muon that is begun again in its middle: each array and each moment to the bit."""
    jobs = Jobs(tmp_path, config="digits_pmf")
    options = STEPS_ALONE | {
        "model.depth": 2, "model.aux_head_depth": 1, "model.hidden_size": 16,
        "training.ema_val": "",
        "training.ema_half_life": "0.1,0.2", "training.log_per_step": 2, "training.num_steps": 8,
        "training.checkpoint_per_step": 4, "method.guidance_eq": "cfg",
    }  # fmt: skip
    jobs.run_here(tmp_path / "whole", options)
    for steps in (4, 8):
        jobs.run_here(tmp_path / "parts", options | {"training.num_steps": steps})
    whole, parted = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "parts")
    assert whole.keys() == parted.keys() and any("muon" in key for _, key in whole)
    for key, value in whole.items():
        if not isinstance(value, dict):
            np.testing.assert_array_equal(value, parted[key], err_msg=str(key))
