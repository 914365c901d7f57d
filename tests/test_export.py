"""Weights for others: the Hugging Face layout, and SiT's names for PyTorch."""

import json
import os
import re
import subprocess
from pathlib import Path

import jax
import make
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import generator
import parts
from configs import load_config, saved
from formats import hugging_face, sit, start, torch_files
from models import dit, network
from run import inherit, results, resume, weights
from scripts import export_checkpoint
from utils import trees

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a DiT, with a result of its weights and one of others."""
    folder = tmp_path_factory.mktemp("run")
    _, params = make.run(folder, *make.NETWORKS["DiT"], "training.learning_rate=0.5")
    result = {"fid": 12.5, "num_samples": 100, "weights": "ema", "num_steps": 1, "features": "any"}
    result |= {"evaluator": "meanflow", "checkpoint_step": 20}
    results.save(folder, result | {"weights_checksum": hugging_face.checksum(params)})
    results.save(folder, result | {"weights_checksum": "0", "fid": 99.5})
    return folder


def export(source, to, *words):
    return export_checkpoint.main(["--from", str(source), "--to", str(to), *words])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "digits"
    assert export(run, folder, "--format=safetensors", "--license=mit") == 0
    return folder


def assert_equal(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


# safetensors ----------------------------------------------------------------------------------


def test_what_is_exported_loads_back_bit_by_bit(run, exported):
    ours, theirs = generator.load(run), generator.load(exported)
    assert_equal(ours.params, theirs.params)
    assert ours.step == theirs.step
    assert ours.config.method == theirs.config.method and ours.config.model == theirs.config.model
    assert_equal(generator.load(exported / "model.safetensors").params, theirs.params)
    with pytest.raises(ValueError, match="average: 'params' is none of ema, ema_0.9999"):
        generator.load(exported, average="params")


def test_arrays_in_another_order_are_written_as_they_are(tmp_path):
    """Of a transposed array safetensors would write the memory under the new shape."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"a": {"kernel": array.T}, "b": {"kernel": array[:, ::2]}}
    hugging_face.export(
        tmp_path / "a", tree, step=1, weights="ema", options={}, identity={}, card=""
    )
    assert_equal(hugging_face.load(tmp_path / "a")["tree"], tree)


@pytest.mark.parametrize("name", ["imfDiT", "UNet"])
def test_every_network_is_exported(name, tmp_path):
    _, params = make.run(tmp_path / "run", *make.NETWORKS[name])
    assert export(tmp_path / "run", tmp_path / "a", "--format=safetensors") == 0
    model = generator.load(tmp_path / "a")
    assert_equal(model.params, params)
    if name == "imfDiT":
        assert model.config.sampling.omega == (2.0,)
    else:  # what was exported is exported again
        assert export(tmp_path / "a", tmp_path / "b", "--format=safetensors") == 0
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_it_leaves_accelerators_to_a_run(run, tmp_path):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        assert export(run, tmp_path / "a", "--format=safetensors") == 0
        assert jax.config.jax_platforms == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


def test_jobs_take_it(run, exported):
    """Sampling and evaluation its options, a run that begins with it its weights."""
    argv = ["--config=configs/load_config.py:default", "--config.sample_only=True"]
    argv += [f"--config.load_from={exported}", "--config.dataset.root=none"]
    config, _ = load_config.from_command_line(argv)
    adopted = inherit.adopt(config, "nowhere", load_config.given(argv))
    assert adopted.model.hidden_size == 16 and adopted.dataset.vae == "none"
    model = parts.make(adopted)
    found = weights.load(str(exported), model.param_shapes(), adopted.dataset)
    assert found.params is None and found.ema_params.keys() == {"ema_0.9999"}
    with adopted.unlocked():
        adopted.init_from = str(exported)
    fresh = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.param_shapes())
    begun, line = make.begin(adopted, model.module, fresh)
    assert_equal(begun, weights.choose(found, "ema"))
    state = make.State(0, fresh, {"ema_0.5": fresh}, ())
    shardings = jax.tree.map(
        lambda leaf: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state
    )
    state = resume.from_weights(state, found, shardings)
    assert_equal(state.params, begun)
    assert_equal(state.ema_params["ema_0.5"], begun)


def test_the_card(exported, run):
    text = (exported / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()
    head = yaml.safe_load(head)
    assert head["license"] == "mit" and "meanflow" in head["tags"]
    assert "fid@100 12.5000 (ema, 1-step" in body and "99.5" not in body
    assert body.count("# digits") == 1
    (command,) = re.findall(r"```bash\npython main.py --workdir=WORKDIR (.*?)```", body, re.S)
    config, rest = load_config.from_command_line(
        [*command.replace("\\\n", "").split(), "--config.dataset.root=none"]
    )
    ours, theirs = saved.flat(config), saved.of_run(generator.load(run).options)
    different = {name for name in ours if ours[name] != theirs[name]}
    assert rest == [] and different == set(), different
    assert ours["training.learning_rate"] == 0.5


def test_no_path_of_the_machine_is_told(tmp_path):
    words = [f"dataset.vae={tmp_path}", f"fid.cache_ref={tmp_path}/ref.npz"]
    make.run(tmp_path / "run", *make.NETWORKS["DiT"], *words)
    assert export(tmp_path / "run", tmp_path / "to", "--format=safetensors") == 0
    for name in ("config.json", "README.md"):
        assert str(tmp_path.parent) not in (tmp_path / "to" / name).read_text()
    named = {"autoencoder": {"name": "/a/b/vae", "encoder": "12"}, "records": {"vae": "mse"}}
    assert hugging_face.without_folders(named)["autoencoder"] == {"name": "vae", "encoder": "12"}


def changed_weights(change):
    def write(folder):
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        tree = trees.unflatten({k.replace(".", "/"): a for k, a in arrays.items()})
        config["checksum"] = hugging_face.checksum(tree)
        (folder / "config.json").write_text(json.dumps(config))

    return write


def changed_config(**entries):
    def write(folder):
        config = json.loads((folder / "config.json").read_text()) | entries
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return write


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


BIAS = "x_embedder.bias"
STRICT = {
    "missing": (changed_weights(lambda a: a.pop(BIAS)), "missing: x_embedder/bias"),
    "left over": (changed_weights(lambda a: a.update(new=a[BIAS])), "left over: new"),
    "misshapen": (
        changed_weights(lambda a: a.update({BIAS: a[BIAS][:3]})),
        "x_embedder/bias (3,) instead of (16,)",
    ),
    "another type": (
        changed_weights(lambda a: a.update({BIAS: a[BIAS].astype(np.float16)})),
        "x_embedder.bias of float16",
    ),
    "cut": (cut, "damaged or not a safetensors file"),
    "another bit": (flip, "(checksum)"),
    "another model": (changed_config(model_type="bert"), "model_type 'bert'"),
    "a later version": (changed_config(version=2), "of version 2"),
    "a lost entry": (changed_config(options=None), "missing: options"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not a conf"),
}


@pytest.mark.parametrize("damage, line", STRICT.values(), ids=STRICT)
def test_reading_is_strict(exported, tmp_path, damage, line):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError) as error:
        generator.load(tmp_path)
    assert line in str(error.value) and "\n" not in str(error.value)


# SiT ------------------------------------------------------------------------------------------


@jax.jit
def velocity(params, z, t, h, y):
    net = dit.DiT(1, 16, 2, 2, 3)
    return network.function(net)(params, (z, {"t": t, "h": h, "y": y}))[0].u


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_under_the_names_of_sit_it_is_the_same_function(run, tmp_path, steps):
    """At h = 1 / steps; read back as a SiT, whose velocity does not depend on h."""
    assert export(run, tmp_path, "--format=sit", f"--steps={steps}") == 0
    (path,) = tmp_path.iterdir()
    found = sit.load(path, "ema", "sit")
    params = generator.load(run).params
    fresh = jax.tree.map(np.zeros_like, jax.device_get(params))
    theirs, _ = start.merge(fresh, found, "y_embedder/embedding", "here")
    draw, t = np.random.default_rng(0), np.linspace(1, 0.25, 4, dtype=np.float32)
    z, y = draw.standard_normal((4, 4, 4, 1), np.float32), np.array([0, 1, 2, 3])
    h = np.full_like(t, 1 / steps if steps else 0)
    expected = velocity(params, z, t, h, y)
    np.testing.assert_allclose(velocity(theirs, z, t, 0 * h, y), expected, atol=2e-5)
    assert np.abs(velocity(params, z, t, h + 0.5, y) - expected).max() > 1e-3
    assert found.positions.shape == (1, 4, 16)


@pytest.mark.parity
def test_a_sit_comes_back_as_it_was(golden):
    found = sit.load(golden / "sit_tiny.pt", "ema", "sit")
    state = torch_files.load(golden / "sit_tiny.pt")
    back = sit.state_of(found.arrays, {}, found.positions[0])
    C = found.arrays["x_embedder/kernel"].shape[2]
    for name, array in state.items():
        ours = back.pop(name)
        if name.startswith("final_layer.linear"):  # the half of sigma is zero in ours
            ours, array = (a.reshape(-1, 2 * C, *a.shape[1:])[:, :C] for a in (ours, array))
        np.testing.assert_allclose(ours, array, atol=1e-6 if "t_embedder" in name else 0)
    assert back == {}


def test_a_constant_guidance_is_folded_in(tmp_path):
    words = ["method.name=improved", "sampling.omega=2", "model.time_cond=h"]
    make.run(tmp_path / "run", *make.NETWORKS["DiT"], *words)
    model = generator.load(tmp_path / "run")
    constants = export_checkpoint.constants(model, 2)
    assert constants == {"h": 0.5, "omega": 0.5, "t_min": 0.0, "t_max": 1.0}
    assert export_checkpoint.constants(model, 0, 4.0)["omega"] == 0.75
    assert export(tmp_path / "run", tmp_path / "to", "--format=sit", "--omega=3") == 0
    state = torch_files.load(tmp_path / "to" / "sit_20_1step.pt")
    arrays, bias = trees.flatten(jax.device_get(model.params)), 0
    for name, value in {"h": 1, "omega": 1 - 1 / 3, "t_min": 0, "t_max": 1}.items():
        layers = {k.split("/", 1)[1]: a for k, a in arrays.items() if k.startswith(f"{name}_emb")}
        embedder = dit.TimeEmbedder(16)
        params = trees.unflatten(layers)
        bias = bias + embedder.apply({"params": params}, np.full(1, value, np.float32))[0]
    np.testing.assert_allclose(state["t_embedder.mlp.2.bias"], bias, rtol=1e-4, atol=1e-5)
    assert not state["t_embedder.mlp.2.weight"].any()


REFUSED = {
    "another network": (make.NETWORKS["UNet"], ["--format=sit"], "not a DiT"),
    "steps of a velocity": (make.NETWORKS["flow"], ["--format=sit", "--steps=1"], "--steps 1"),
    "a second time": (
        [*make.NETWORKS["DiT"], "model.time_cond=t,r"],
        ["--format=sit", "--steps=2"],
        "embeds r beside t",
    ),
}


@pytest.mark.parametrize("words, options, line", REFUSED.values(), ids=REFUSED)
def test_what_has_no_place_is_refused(tmp_path, capsys, words, options, line):
    make.run(tmp_path / "run", *words)
    assert export(tmp_path / "run", tmp_path / "to", *options) == 1
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "to").exists()


def test_nothing_is_overwritten(run, exported, tmp_path, capsys):
    assert export(run, exported, "--format=safetensors") == 1
    assert "is there already" in capsys.readouterr().err
    assert export(run, tmp_path, "--format=sit") == export(run, tmp_path, "--format=sit") - 1 == 0
    assert "is there already" in capsys.readouterr().err
    assert export(run, tmp_path / "to", "--format=msgpack", "--steps=2") == 1
    assert "--steps is no option of --format=msgpack" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 0])
def test_the_snippet_samples_the_same_in_torch(run, tmp_path, steps):
    """That of docs/python.md, by the Python that MEANFLOW_TORCH names, which has torch."""
    python = os.environ.get("MEANFLOW_TORCH")
    if not python:
        pytest.skip("MEANFLOW_TORCH=PYTHON names an interpreter with torch and numpy")
    assert export(run, tmp_path, "--format=sit", f"--steps={steps}") == 0
    text = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"^```python\n# PyTorch\n(.*?)^```", text, re.M | re.S)
    (path,) = tmp_path.glob("*.pt")
    model, N = generator.load(run), steps or 8
    noise = model.noise(3, seed=5)
    np.save(tmp_path / "noise.npy", noise)
    for old, new in {
        r'"exported/\w+\.pt"': f'"{path}"',
        r"heads, steps = .*": f"heads, steps = 2, {N}; import numpy",
        r"y = .*": "y = torch.tensor([2, 0, 1])",
        r"x = torch.randn\(.*": (
            f'x = torch.tensor(numpy.load("{tmp_path}/noise.npy")).permute(0, 3, 1, 2)'
        ),
    }.items():
        code, count = re.subn(rf"^(.*){old}" if old[0] == '"' else rf"^{old}",
                              (lambda m, new=new, old=old: (m[1] if old[0] == '"' else "") + new),
                              code, flags=re.M)  # fmt: skip
        assert count == 1, old
    code += f'numpy.save("{tmp_path}/x.npy", x.permute(0, 2, 3, 1).numpy())\n'
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    sampler = "ode" if steps else "euler"
    expected = model.sample([2, 0, 1], noise, N, output="latents", sampler=sampler)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-4)
