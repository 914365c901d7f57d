"""Published checkpoints <-> our tree (formats/published.py, scripts/export_checkpoint.py)."""

import shutil

import jax
import numpy as np
import pytest
from flax import serialization

from formats import published
from run import checkpoint
from scripts import export_checkpoint
from utils import files, trees

FORMS = ("msgpack", "orbax")


def assert_equal(ours, theirs):
    """Same names, same numbers, same types."""
    ours, theirs = (jax.tree_util.tree_flatten_with_path(tree) for tree in (ours, theirs))
    assert ours[1] == theirs[1]
    for (path, a), (_, b) in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path), strict=True)


@pytest.fixture(scope="module")
def file_state(golden):
    """The state in the msgpack file, under the published names."""
    (path,) = (golden / "released_checkpoint" / "msgpack").iterdir()
    return serialization.msgpack_restore(path.read_bytes())


@pytest.fixture(scope="module")
def state(golden):
    return published.load(golden / "released_checkpoint" / "msgpack")


@pytest.fixture
def write(file_state, tmp_path):
    """Function that writes a changed copy of the published state and returns the line with which
    it is refused."""

    def refusal(change):
        state = jax.tree.map(np.copy, file_state) | {"step": file_state["step"]}
        change(state)
        path = tmp_path / f"checkpoint_{state.get('step', 0)}"
        path.write_bytes(serialization.msgpack_serialize(state))
        with pytest.raises(ValueError) as caught:
            published.load(path)
        line = str(caught.value)
        assert "\n" not in line and str(path) in line
        return line

    return refusal


# Reading


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_read_by_folder_and_by_name(golden, state, form):
    folder = golden / "released_checkpoint" / form
    (path,) = folder.iterdir()
    assert published.is_published(folder) and published.is_published(path)
    assert_equal(published.load(folder), state)
    assert_equal(published.load(path), state)
    assert state["step"] == int(path.name.removeprefix("checkpoint_"))


@pytest.mark.parity
def test_the_averages_are_the_golden_parameters_and_the_weights_are_not(golden, state):
    """Each array by a map of its own, written out here as text edits of the published names."""
    data = np.load(golden / "meanflow.npz")
    theirs = {k.removeprefix("params/net/"): data[k] for k in data if k.startswith("params/")}
    short = {
        "_flax_linear/": "",
        "adaLN_modulation/layers_1": "adaLN",
        "mlp/layers_0": "fc1",
        "mlp/layers_2": "fc2",
        "embedding_table/_flax_embedding/": "",
        "x_embedder/proj": "x_embedder",
    }
    ema_params, params = trees.flatten(state["ema_params"]), trees.flatten(state["params"])
    seen, same = set(), []
    for name, array in theirs.items():
        for old, new in short.items():
            name = name.replace(old, new)
        if name.startswith("blocks/"):
            _, layer, rest = name.split("/", 2)
            name, row = f"blocks/{rest}", int(layer.removeprefix("layers_"))
        else:
            row = ...
        np.testing.assert_array_equal(ema_params[name][row], array, err_msg=name)
        same.append(np.array_equal(params[name][row], array))
        seen.add(name)
    assert seen == ema_params.keys() == params.keys()
    assert not any(same)
    assert all(array.dtype == np.float32 for array in ema_params.values())


@pytest.mark.parity
def test_the_moments_of_adam_come_along(file_state, state):
    adam = file_state["opt_state"]["0"]
    assert state["opt_state"]["count"] == adam["count"]
    assert state["opt_state"]["count"].dtype == np.int32
    for moment in ("mu", "nu"):
        ours, theirs = state["opt_state"][moment], adam[moment]["net"]
        bias = theirs["t_embedder"]["mlp"]["layers_2"]["_flax_linear"]["bias"]
        np.testing.assert_array_equal(ours["t_embedder"]["fc2"]["bias"], bias)
        last = len(theirs["blocks"]) - 1
        kernel = theirs["blocks"][f"layers_{last}"]["mlp"]["fc1"]["_flax_linear"]["kernel"]
        np.testing.assert_array_equal(ours["blocks"]["mlp"]["fc1"]["kernel"][last], kernel)
    assert np.all(state["opt_state"]["nu"]["x_embedder"]["bias"] >= 0)


def test_blocks_are_stacked_by_number_not_by_name(state, tmp_path):
    """Twelve blocks: layers_10 comes before layers_2 in the alphabet."""
    tree = dict(state["params"])
    blocks = jax.tree.map(lambda a: np.repeat(a[:1], 12, 0), tree["blocks"])
    blocks["attn"]["proj"]["bias"] += np.arange(12, dtype=np.float32)[:, None]
    tree["blocks"] = blocks
    published.export(tree, tree, 7, tmp_path)
    assert_equal(published.load(tmp_path)["params"], tree)
    file = serialization.msgpack_restore((tmp_path / "checkpoint_7").read_bytes())
    bias = file["params"]["net"]["blocks"]["layers_10"]["attn"]["proj"]["_flax_linear"]["bias"]
    np.testing.assert_array_equal(bias, blocks["attn"]["proj"]["bias"][10])


def test_of_several_checkpoints_the_last_is_taken(state, tmp_path):
    for step in (9, 100):
        published.export(state["params"], state["ema_params"], step, tmp_path)
    assert published.load(tmp_path)["step"] == 100


def test_a_run_of_ours_is_not_taken_for_a_published_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "100" / "params").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "checkpoints" / "100", tmp_path / "nowhere"):
        assert not published.is_published(path)
    with pytest.raises(
        FileNotFoundError, match="no published checkpoint, that is .*checkpoint_STEP"
    ):
        published.load(tmp_path)


def test_a_checkpoint_without_optimizer_is_read(file_state, tmp_path):
    some = {k: v for k, v in file_state.items() if k != "opt_state"}
    (tmp_path / "checkpoint_3").write_bytes(serialization.msgpack_serialize(some))
    assert published.load(tmp_path)["opt_state"] is None


# Refusals


def test_a_missing_array_is_named(write):
    line = write(lambda state: state["params"]["net"]["final_layer"]["linear"].clear())
    assert "params: missing: net/final_layer/linear/_flax_linear/bias" in line
    assert "left over" not in line


def test_a_left_over_array_is_named(write):
    line = write(lambda s: s["ema_params"]["net"]["t_embedder"].update(gain=np.zeros(3)))
    assert "ema_params: left over: net/t_embedder/gain" in line


def test_an_array_of_another_shape_is_named(write):
    def change(state):
        layer = state["params"]["net"]["blocks"]["layers_0"]["mlp"]["fc1"]["_flax_linear"]
        layer["kernel"] = layer["kernel"].T

    name = "net/blocks/layers_0/mlp/fc1/_flax_linear/kernel"
    assert f"params: of another shape: {name}" in write(change)


def test_a_gap_in_the_depth_is_noticed(write):
    line = write(lambda s: s["params"]["net"]["blocks"].pop("layers_0"))
    assert "missing: net/blocks/layers_0/" in line


def test_a_network_without_blocks_is_refused(write):
    line = write(lambda s: s["params"]["net"].pop("blocks"))
    assert "missing: net/blocks/layers_0/" in line


def test_a_tree_of_something_else_is_refused(write):
    assert "not a DiT" in write(lambda s: s.update(params={"Dense_0": {"kernel": np.ones((2, 2))}}))


def test_top_level_entries_are_strict(write):
    assert "missing: ema_params" in write(lambda s: s.pop("ema_params"))
    assert "left over: batch_stats" in write(lambda s: s.update(batch_stats={}))


def test_the_optimizer_is_strict(write):
    assert "opt_state: missing: 0/nu" in write(lambda s: s["opt_state"]["0"].pop("nu"))
    assert "left over: 2" in write(lambda s: s["opt_state"].update({"2": {"count": np.ones(())}}))
    line = write(lambda s: s["opt_state"]["0"]["mu"]["net"].pop("x_embedder"))
    assert "opt_state/0/mu: not a DiT: missing or misshapen: net/x_embedder/proj/kernel" in line


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_named(golden, tmp_path, form):
    (source,) = (golden / "released_checkpoint" / form).iterdir()
    path = tmp_path / source.name
    data = (source / "checkpoint" if source.is_dir() else source).read_bytes()
    if source.is_dir():
        path.mkdir()
        path = path / "checkpoint"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        published.load(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    (tmp_path / "checkpoint_1").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="damaged"):
        published.load(tmp_path)


def test_weights_of_another_model_are_named(state):
    tree = state["params"]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    trees.check_tree(shapes, tree, "here")
    deeper = shapes | {
        "blocks": jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((s.shape[0] + 1, *s.shape[1:]), s.dtype),
            shapes["blocks"],
        )
    }
    with pytest.raises(ValueError, match=r"here: .*of another shape: blocks/.* instead of \("):
        trees.check_tree(deeper, tree, "here")
    fewer = {k: v for k, v in shapes.items() if k != "h_embedder"}
    with pytest.raises(ValueError, match="left over: h_embedder/fc1/bias"):
        trees.check_tree(fewer, tree, "here")


# Writing


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_was_read(golden, state, tmp_path, form):
    parts = {k: state[k] for k in ("params", "ema_params", "step", "opt_state")}
    path = published.export(**parts, folder=tmp_path, form=form)
    assert [child.name for child in tmp_path.iterdir()] == [path.name], "nothing else is left"
    assert_equal(published.load(tmp_path), state)
    (source,) = (golden / "released_checkpoint" / form).iterdir()
    files = [p / "checkpoint" if form == "orbax" else p for p in (path, source)]
    assert_equal(*(serialization.msgpack_restore(file.read_bytes()) for file in files))


def test_without_a_state_of_adam_a_fresh_one_is_written(file_state, state, tmp_path):
    path = published.export(state["params"], state["ema_params"], 5, tmp_path)
    file = serialization.msgpack_restore(path.read_bytes())
    assert trees.flatten(file).keys() == trees.flatten(file_state).keys()
    adam = published.load(path)["opt_state"]
    assert adam["count"] == 0
    assert all(not np.any(a) for a in jax.tree.leaves((adam["mu"], adam["nu"])))


def test_a_tree_that_is_not_ours_is_not_written(state, tmp_path):
    short = {k: v for k, v in state["params"].items() if k != "h_embedder"}
    with pytest.raises(ValueError, match="params: missing: h_embedder/fc1/bias"):
        published.export(short, state["ema_params"], 1, tmp_path / "to")
    with pytest.raises(ValueError, match="ema_params: not a DiT"):
        published.export(state["params"], {}, 1, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_an_existing_checkpoint_is_not_overwritten(state, tmp_path):
    (tmp_path / "checkpoint_1").write_text("precious")
    with pytest.raises(FileExistsError, match="checkpoint_1"):
        published.export(state["params"], state["ema_params"], 1, tmp_path)
    assert (tmp_path / "checkpoint_1").read_text() == "precious"


def test_a_write_that_fails_leaves_nothing(state, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    for form in FORMS:
        with pytest.raises(OSError, match="full"):
            published.export(state["params"], state["ema_params"], 1, tmp_path, form=form)
    assert list(tmp_path.iterdir()) == []


# The script


@pytest.mark.parity
def test_the_script_turns_one_published_form_into_the_other(golden, state, tmp_path, capsys):
    source = golden / "released_checkpoint" / "orbax"
    for form in FORMS:
        argv = ["--from", str(source), "--to", str(tmp_path / form), "--format", form]
        assert export_checkpoint.main(argv) == 0
        assert f"checkpoint_{state['step']}" in capsys.readouterr().out
        assert_equal(published.load(tmp_path / form), state)


def test_the_script_exports_a_run_of_ours(state, tmp_path):
    further = jax.tree.map(lambda a: a + 1, state["ema_params"])
    with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (10, 20):
            checkpointer.save(
                step,
                params=jax.tree.map(lambda a, step=step: a + step, state["params"]),
                ema_params={"ema_0.9": state["ema_params"], "ema_0.8": further},
                progress={"step": np.int32(step), "opt_state": [state["opt_state"], None]},
                data={},
                config={"training": {"ema_val": [0.9, 0.8]}},
            )
    argv = ["--from", str(tmp_path / "run"), "--to", str(tmp_path / "to")]
    assert export_checkpoint.main(argv) == 0
    assert export_checkpoint.main([*argv, "--step=10"]) == 0
    for step in (10, 20):
        back = published.load(tmp_path / "to" / f"checkpoint_{step}")
        assert back["step"] == step
        assert_equal(back["ema_params"], state["ema_params"])
        assert_equal(back["params"], jax.tree.map(lambda a, s=step: a + s, state["params"]))
        assert_equal(back["opt_state"], state["opt_state"])


def test_the_script_says_in_one_line_what_is_wrong(tmp_path, capsys, golden):
    assert export_checkpoint.main(["--from", str(tmp_path), "--to", str(tmp_path / "to")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error
    source = golden / "released_checkpoint" / "msgpack"
    shutil.copytree(source, tmp_path / "to")
    argv = ["--from", str(source), "--to", str(tmp_path / "to")]
    assert export_checkpoint.main(argv) == 1
    assert "is there already" in capsys.readouterr().err
