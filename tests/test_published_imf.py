"""Published checkpoints of improved MeanFlow <-> our tree, and weights that do not fit."""

import shutil

import jax
import make
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_published import assert_equal

import parts
from formats import published, published_imf
from models import network
from run import weights
from scripts import export_checkpoint
from utils import trees

FORMS = ("full", "inference")


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "released_imf"


@pytest.fixture(scope="module")
def states(folder):
    return {form: published_imf.load(published_imf.find(folder / form)) for form in FORMS}


@pytest.fixture(scope="module")
def tree(states):
    """The averages of `full` under the published names."""
    return trees.flatten(published_imf.to_published(states["full"]["ema_params"], "tree"))


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_read(folder, states, form, golden):
    (path,) = (folder / form).iterdir()
    assert published_imf.find(folder / form) == published_imf.find(path) == path
    assert published_imf.find(golden / "released_checkpoint" / "orbax") is None
    state = states[form]
    assert state["step"] == int(path.name.removeprefix("checkpoint_"))
    assert state["opt_state"]["count"] == state["step"]
    with np.load(golden / "imf.npz") as file:
        expected = {k.removeprefix("params/"): file[k] for k in file if k.startswith("params/")}
    if form == "inference":
        expected = {k: a for k, a in expected.items() if not k.startswith("net/v_")}
        for part in (state["params"], state["opt_state"]["mu"]):
            assert not any(name.startswith("v_") for name in part)
    ema, params = (
        trees.flatten(published_imf.to_published(state[name], name))
        for name in ("ema_params", "params")
    )
    assert_equal(ema, expected)
    assert not any(np.array_equal(params[name], ema[name]) for name in ema)
    without = published_imf.load(path, optimizer=False)
    assert_equal(without, state | {"opt_state": None})


def refused(tree):
    with pytest.raises(ValueError) as caught:
        published_imf.from_published(trees.unflatten(tree), "FILE")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("FILE: ")
    return str(caught.value)


def test_older_names(states, tree):
    older = {new: old for old, new in published_imf.ALIASES.items()}
    renamed = {
        "/".join(older.get(part, part) for part in name.split("/")): array
        for name, array in tree.items()
    }
    assert len(renamed.keys() - tree.keys()) > len(older)
    found = published_imf.from_published(trees.unflatten(renamed), "FILE")
    assert_equal(found, states["full"]["ema_params"])
    old = "net/shared_blocks_0/attn_gate"
    assert "two names" in refused(tree | {old: tree["net/shared_blocks_0/attn_scale"]})


def test_reading_is_strict(tree):
    one, block = "net/class_tokens", "net/v_heads_0/norm1/kernel"
    assert "missing: class_tokens" in refused({k: a for k, a in tree.items() if k != one})
    assert "left over: more" in refused(tree | {"net/more": tree[one]})
    assert "left over: more" in refused(tree | {"more": tree[one]})
    assert "class_tokens" in refused(tree | {one: tree[one][:-1]})
    assert "class_tokens of float16" in refused(tree | {one: tree[one].astype(np.float16)})
    # heads of v are there whole or not at all
    assert "missing: v_heads_0/norm1" in refused({k: a for k, a in tree.items() if k != block})
    heads = {name.split("/")[1] for name in tree if name.startswith("net/v_heads_")}
    for head in heads if len(heads) > 1 else ():
        some = {k: a for k, a in tree.items() if not k.startswith(f"net/{head}/")}
        assert f"missing: {head}/" in refused(some)
    without = {k: a for k, a in tree.items() if not k.startswith("net/v_heads_")}
    assert "v_blocks" not in published_imf.from_published(trees.unflatten(without), "FILE")
    assert "not an imfDiT" in refused({"net/a": tree[one]})


def test_averages_alone_are_enough(states, tmp_path, folder):
    """No params, optimizer or step: the step is that of the folder's name."""
    path = tmp_path / "checkpoint_12"
    tree = published_imf.to_published(states["full"]["ema_params"], "tree")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"ema_params": tree})
        checkpointer.save(tmp_path / "checkpoint_7", {"params": tree, "step": np.int32(7)})
    found = published_imf.load(published_imf.find(tmp_path))
    assert found["step"] == 12 and found["params"] is found["opt_state"] is None
    assert_equal(found["ema_params"], states["full"]["ema_params"])
    with pytest.raises(ValueError, match="missing: ema_params"):
        published_imf.load(tmp_path / "checkpoint_7")
    damaged = tmp_path / "damaged" / "checkpoint_1"
    shutil.copytree(next((folder / "full").iterdir()), damaged)
    (damaged / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or not a published checkpoint"):
        published_imf.load(damaged)


@pytest.mark.parametrize("form", FORMS)
def test_the_script_writes_what_was_read(folder, states, form, tmp_path, capsys):
    arguments = ["--from", str(folder / form), "--to", str(tmp_path)]
    assert export_checkpoint.main(arguments) == 0
    assert_equal(published_imf.load(published_imf.find(tmp_path)), states[form])
    assert export_checkpoint.main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
    assert export_checkpoint.main([*arguments[:3], str(tmp_path / "b"), "--format=msgpack"]) == 1
    assert "orbax" in capsys.readouterr().err


# Weights that do not fit ----------------------------------------------------------------------

LATENTS = [
    f"dataset.latent_mean={','.join(map(str, published_imf.LATENT_MEAN))}",
    f"dataset.latent_std={','.join(map(str, published_imf.LATENT_STD))}",
]


def config_of(state, *words):
    """A config of the network that a state holds."""
    ema = state["ema_params"]
    p, _, channels, D = ema["embedding"]["x_embedder"]["kernel"].shape
    heads = D // ema["blocks"]["attn"]["q_norm"].shape[-1]
    aux, shared = len(ema["u_blocks"]["norm1"]), len(ema["blocks"]["norm1"])
    labels = len(ema["embedding"]["y_embedder"]["embedding"])
    return make.config(
        "model.cls=imfDiT", f"model.patch_size={p}", f"model.hidden_size={D}",
        f"model.depth={shared + aux}", f"model.aux_head_depth={aux}", f"model.num_heads={heads}",
        f"dataset.num_classes={labels - 1}", f"dataset.image_channels={channels}",
        f"dataset.image_size={4 * p}", "method.name=improved", *words,
    )  # fmt: skip


def test_without_a_head_of_v_only_sampling_is_possible(folder, states):
    config = config_of(states["full"], "dataset.vae=none")
    model = parts.make(config)
    optional = model.module.only_for_training
    for form in FORMS:
        found = weights.load(folder / form, model.param_shapes(), config.dataset, may_lack=optional)
        assert_equal(found.ema_params["ema"], states[form]["ema_params"])
    with pytest.raises(ValueError, match="missing: v_blocks"):
        weights.load(folder / "inference", model.param_shapes(), config.dataset, optimizer=True)
    x = np.ones((1, *model.image_shape), np.float32)
    c = {"y": np.zeros(1, np.int32)} | dict.fromkeys(
        ("t", "h", *model.method.conditions), x[:, 0, 0, 0]
    )
    both = [model.net(states[form]["ema_params"], (x, c))[0].u for form in FORMS]
    np.testing.assert_array_equal(*both)


def test_latents_of_another_normalisation_are_refused(folder, states, golden):
    config = config_of(states["full"])
    shapes = parts.make(config).param_shapes()
    with pytest.raises(ValueError, match="normalised by latent_mean .* the factor 0.18215"):
        weights.load(folder / "full", shapes, config.dataset)
    state = published.load(golden / "released_checkpoint" / "msgpack")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state["params"])
    with pytest.raises(ValueError, match="normalised by the factor 0.18215, and dataset asks"):
        weights.load(
            golden / "released_checkpoint" / "msgpack",
            shapes,
            config_of(states["full"], *LATENTS, "dataset.image_channels=4").dataset,
        )
    weights.load(golden / "released_checkpoint" / "msgpack", shapes, config.dataset)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_begins_with_a_published_checkpoint(folder, states, form):
    """Of other classes too; the head of v is new where the file has none."""
    config = config_of(states["full"], "dataset.vae=none", f"init_from={folder / form}")
    model = parts.make(config)
    shapes = network.param_shapes(model.module, model.image_shape)
    fresh = jax.tree.map(lambda a: np.full(a.shape, 7, a.dtype), shapes)
    found, line = make.begin(config, model.module, fresh)
    expected = states[form]["ema_params"]
    missing = fresh.keys() - expected.keys()
    assert missing == (set(model.module.only_for_training) if form == "inference" else set())
    assert_equal(found, expected | {name: fresh[name] for name in missing})
    assert all(name in line for name in missing)

    more = model.module.clone(num_classes=model.num_classes + 2)
    fresh = jax.tree.map(
        lambda a: np.full(a.shape, 7, a.dtype), network.param_shapes(more, model.image_shape)
    )
    found, line = make.begin(config, more, fresh)
    table = trees.flatten(found)[more.label_table]
    np.testing.assert_array_equal(table[-1], trees.flatten(expected)[more.label_table][-1])
    assert np.all(table[:-1] == 7) and "but for the row of none" in line


@pytest.mark.parametrize("size, all_of_them, without_v", [
    ("b2", 145.60, 88.95), ("m2", 230.57, 173.92), ("l2", 509.75, 409.07), ("xl2", 711.11, 610.43)
])  # fmt: skip
def test_the_sizes_are_the_published_ones(size, all_of_them, without_v):
    """In millions of parameters; the published count without v keeps its final layer."""
    model = parts.make(make.config(name=f"imf_{size}"))
    shapes = network.param_shapes(model.module, model.image_shape)
    counts = {name: sum(p.size for p in jax.tree.leaves(shapes[name])) for name in shapes}
    assert round(sum(counts.values()) / 1e6, 2) == all_of_them
    assert round((sum(counts.values()) - counts["v_blocks"]) / 1e6, 2) == without_v
    assert tuple(make.config(name=f"imf_{size}").dataset.latent_std) == published_imf.LATENT_STD
    assert tuple(make.config(name=f"imf_{size}").dataset.latent_mean) == published_imf.LATENT_MEAN
