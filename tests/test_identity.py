"""What things are made of is compared where they are used: records, runs, autoencoders, options."""

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jobs import ALONE, CLASSES, OPTIONS, RECORDS, SHAPE, STEPS_ALONE, write_records

import main
from metrics import provenance, reference
from models import vae
from run import results
from scripts.prepare import statistics
from utils import dataset, environment, files, identity, processes

DIGEST = "d" * 32


def records_of(root, change=0, per_shard=RECORDS):
    """Records like those of `jobs.write_records`, one of them changed by `change`."""
    images = np.random.RandomState(0).randint(0, 256, (RECORDS, *SHAPE)).astype(np.uint8)
    images[7, 0, 0] += np.uint8(change)
    root.mkdir(parents=True)
    starts = range(0, RECORDS, per_shard)
    lengths = []
    for i, start in enumerate(starts):
        part = [
            {"image": images[k], "label": k % CLASSES}
            for k in range(start, min(start + per_shard, RECORDS))
        ]
        path = dataset.shard_path(root, "train", i, len(starts))
        lengths.append(dataset.write_shard(path, part))
    dataset.write_metadata(root, "image", SHAPE, np.uint8, CLASSES, {"train": lengths})
    return root


def run(workdir, options, config="digits"):
    """A job in this process; its exit status."""
    words = [f"--config.{name}={value}" for name, value in options.items()]
    config = f"--config=configs/load_config.py:{config}"
    return main.main([f"--workdir={workdir}", config, *words, ALONE])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, its options, and the records it was trained on."""
    folder = tmp_path_factory.mktemp("identity")
    options = {
        **OPTIONS,
        "dataset.root": write_records(folder / "records"),
        "training.num_steps": 2,
        **STEPS_ALONE,
    }
    assert run(folder / "run", options) == 0
    return folder / "run", options


# Records and runs -------------------------------------------------------------------------------


def test_a_dataset_is_its_records_however_they_lie(tmp_path):
    one = dataset.open_records(records_of(tmp_path / "a")).identity
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert dataset.open_records(tmp_path / "copy").identity == one
    assert dataset.open_records(records_of(tmp_path / "b", per_shard=16)).identity == one
    other = dataset.open_records(records_of(tmp_path / "c", change=1)).identity
    assert other["content"] != one["content"] and other["sample"] != one["sample"]
    assert not list(tmp_path.rglob("unfinished-*"))


def test_of_a_large_set_one_record_that_differs_is_known_by_the_note(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.contents.WHOLE", 10)
    monkeypatch.setattr("utils.contents.SAMPLED", 4)  # records 0, 13, 26 and 39
    one, other = (
        dataset.open_records(records_of(tmp_path / str(i), change=i)).identity for i in (0, 1)
    )
    assert one["sample"] == other["sample"] and one["content"] != other["content"]
    with pytest.raises(ValueError, match="other records than dataset.root holds now"):
        identity.check_run({"records": one}, {"records": other}, "run")
    known = {"records": {"sample": one["sample"]}, "autoencoder": {"name": "a"}}
    more = identity.check_run(known, now := {"records": other, "autoencoder": {}}, "run")
    assert more == {"autoencoder": {"name": "a"}} and not now["autoencoder"]


def test_a_run_goes_on_with_its_own_records_alone(trained, tmp_path, capsys):
    workdir, options = trained
    run_copy = shutil.copytree(workdir, tmp_path / "run")
    other = options | {"training.num_steps": 4, "dataset.root": records_of(tmp_path / "c", 1)}
    assert run(run_copy, other) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "checkpoint 2 was made with other records" in line and "content" in line
    moved = shutil.copytree(options["dataset.root"], tmp_path / "moved")
    assert run(run_copy, other | {"dataset.root": moved}) == 0


def test_a_run_goes_on_in_its_own_environment_alone(trained, tmp_path, capsys, caplog):
    workdir, options = trained
    run_copy = shutil.copytree(workdir, tmp_path / "run")
    with jax.default_matmul_precision("highest"):
        assert run(run_copy, options | {"training.num_steps": 4}) == 1
    assert "matmul_precision default, now highest" in capsys.readouterr().err
    before = {"environment": environment.describe() | {"jax": "0.1", "device": "abacus"}}
    with caplog.at_level("INFO"):
        identity.check_run(before, {"environment": environment.describe()}, "run")
    assert "jax 0.1" in caplog.text and "device abacus" in caplog.text


def test_what_a_shell_leaves_behind_is_pinned(caplog):
    try:
        for name, value in (("jax_default_prng_impl", "rbg"), ("jax_enable_x64", True)):
            jax.config.update(name, value)
        environment.pin()
        assert jax.config.jax_default_prng_impl == "threefry2x32"
        assert not jax.config.jax_enable_x64
        assert "JAX_DEFAULT_PRNG_IMPL=rbg is not used" in caplog.text
        assert "JAX_ENABLE_X64=True is not used" in caplog.text
    finally:
        environment.pin()


def test_processes_with_different_settings_are_told_apart(monkeypatch):
    writer = environment.describe() | {"matmul_precision": "highest"}
    monkeypatch.setattr(processes, "from_writer", lambda value: writer)
    with pytest.raises(ValueError, match="another environment than process 0: matmul_precision"):
        processes.check_same("environment", environment.describe())


# Options and results ----------------------------------------------------------------------------


def test_the_options_of_the_weights_come_with_them(trained, tmp_path, capsys, caplog):
    workdir, options = trained
    asked = {
        "eval_only": True,
        "load_from": workdir,
        **{name: value for name, value in options.items() if name.startswith("fid.")},
        "fid.features": "pixels",
        "fid.cache_ref": "",
        "dataset.root": options["dataset.root"],
    }
    with caplog.at_level("INFO"):
        assert run(tmp_path, asked, "run_b4") == 0
        assert "model.cls DiT (not DiT_B_4, configs/run_b4.yml)" in caplog.text
        assert run(tmp_path, options | asked) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["environment"] == environment.describe() and len(result["options"]) == 32
    for name, value in (("model.num_heads", 1), ("model.time_cond", "t,r"), ("method.kappa", 0.1)):
        capsys.readouterr()
        assert run(tmp_path, asked | {name: value}) == 2
        line = capsys.readouterr().err
        assert f"{name} {options.get(name, '')}" in line and f"not {value}" in line
    assert json.loads((tmp_path / "results.json").read_text()) == [result]


def test_results_of_jobs_that_write_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: results.save(tmp_path, {"fid": 1.0, "seed": i}), range(40)))
    found = json.loads((tmp_path / "results.json").read_text())
    assert sorted(result["seed"] for result in found) == list(range(40))
    with files.alone(tmp_path / ".results.json.lock", "me"):  # and nobody holds it any more
        pass


# Autoencoders -----------------------------------------------------------------------------------


def test_latents_belong_to_their_encoder(golden):
    tiny = vae.load(golden / "vae" / "tiny").identity
    again = vae.load(golden / "vae" / "tiny_legacy_names").identity
    assert tiny["encoder"] == again["encoder"] and tiny["decoder"] == again["decoder"]
    made = {"vae": "a", "encoder": tiny["encoder"]}
    identity.check_autoencoder(made, again, "records")
    identity.check_autoencoder(made, tiny | {"decoder": DIGEST}, "records")
    with pytest.raises(ValueError, match="did not make the latents of records"):
        identity.check_autoencoder(made, tiny | {"encoder": DIGEST}, "records")


def test_what_cannot_be_known_is_said(caplog):
    with caplog.at_level("INFO"):
        mse = {"name": "mse", "encoder": DIGEST, "decoder": DIGEST}
        identity.check_autoencoder({"vae": "mse"}, mse, "records")
        identity.check_autoencoder({}, {}, "records")  # pixels
        assert not caplog.text
        identity.check_autoencoder({"source": "pt"}, mse, "imported records")
        assert "imported records does not say which autoencoder" in caplog.text
        identity.check_run({}, {"records": {"sample": DIGEST}}, "an old run")
        assert "an old run is of a version" in caplog.text


def test_the_scale_that_an_autoencoder_asks_for_is_not_passed_over(golden, tmp_path, caplog):
    vae.load(golden / "vae" / "tiny")
    assert not caplog.text
    folder = shutil.copytree(golden / "vae" / "tiny", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    config |= {"scaling_factor": 0.25, "shift_factor": 0.5}
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    vae.load(folder)
    assert "dataset.latent_mean=0.5,0.5,0.5,0.5 dataset.latent_std=4,4,4,4" in caplog.text


# Statistics and numbers that are not finite -----------------------------------------------------


def test_statistics_that_are_there_are_those_asked_for(tmp_path, capsys):
    path = tmp_path / "stats.npz"
    args = argparse.Namespace(fid_stats=path, image_size=8, fid_resize="tf1", overwrite=False)
    items = [("val/a/0.png", 0), ("val/a/1.png", 0)]
    statistics.check(args, "val", items)  # there are none
    said = statistics.asked(args, "val", items) | {"number": 2, "images": DIGEST, "weights": "w"}
    reference.save_reference(path, np.zeros(3), np.eye(3), **said)
    statistics.check(args, "val", items)
    for split, other, change in (
        ("train", items, {}),
        ("val", items[:1], {}),
        ("val", items, {"image_size": 16}),
        ("val", items, {"fid_resize": "half_pixel"}),
    ):
        with pytest.raises(ValueError, match="stats.npz holds other statistics"):
            statistics.check(argparse.Namespace(**{**vars(args), **change}), split, other)
    reference.save_reference(path, np.zeros(3), np.eye(3), resize="tf1")  # as of before
    statistics.check(args, "val", items)
    assert "does not say of which images" in capsys.readouterr().out


def test_a_result_says_what_its_reference_is(tmp_path, caplog):
    path = tmp_path / "stats.npz"

    def described(side=8, **arrays):
        np.savez(path, **{"mu": np.zeros(3), "sigma": np.eye(3), **arrays})
        caplog.clear()
        said = reference.load_reference(path)["said"]
        return said.get("resize"), provenance.describe(said, path, side)

    caplog.set_level("INFO")
    ours = {"split": "val", "number": 4, "size": 8, "images": DIGEST, "resize": "tf1"}
    resize, said = described(**ours)
    assert resize == "tf1" and said["reference_images"] == DIGEST
    assert "statistics of 4 val images" in caplog.text and "WARNING" not in caplog.text
    described(side=16, **ours)
    assert "of images of 8 pixels, and those generated have 16" in caplog.text
    assert described(mu_s=np.zeros(3), sigma_s=np.eye(3)) == ("tf1", {"reference_origin": "ADM"})
    published = {"ref_mu": np.zeros(3), "ref_sigma": np.eye(3)}
    assert described(**published)[0] == "half_pixel"
    assert described() == (None, {"reference_origin": "unknown"})
    assert "nor how they were resized" in caplog.text and "WARNING" in caplog.text


def test_records_that_are_not_finite_are_named(tmp_path, monkeypatch, capsys):
    moments = np.random.RandomState(0).rand(RECORDS, 4, 4, 8).astype(np.float32)
    moments[[3, 30], 0, 0, 0] = np.nan
    path = dataset.shard_path(tmp_path, "train", 0, 1)
    dataset.write_shard(path, ({"moments": x, "label": 0} for x in moments))
    dataset.write_metadata(tmp_path, "moments", (4, 4, 8), np.float32, 1, {"train": [RECORDS]})
    options = OPTIONS | {
        "dataset.root": tmp_path,
        "dataset.vae": "mse",
        "dataset.image_channels": 4,
        "dataset.num_classes": 1,
        "training.batch_size": RECORDS,
        "training.log_per_step": 1,
        **STEPS_ALONE,
    }
    assert run(tmp_path / "run", options) == 1
    line = capsys.readouterr().err
    assert "step 1:" in line and f"The batch itself holds them: records 3, 30 of {tmp_path}" in line
