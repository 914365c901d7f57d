"""Weights of the autoencoder in folders and caches as people have them: what is there is said."""

import os
import shutil

import pytest

from models import vae

CONFIG, WEIGHTS = "config.json", vae.WEIGHT_FILES[0]


@pytest.fixture
def cached(tmp_path, golden, monkeypatch):
    """A snapshot of `mse` in a Hugging Face cache, which refs/main names."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--stabilityai--sd-vae-ft-mse"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(golden / "vae" / "tiny", snapshot)
    for path in (snapshot, *snapshot.iterdir()):
        path.chmod(0o755)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    return snapshot


def refused(name):
    with pytest.raises(FileNotFoundError) as error:
        vae.find(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_snapshot_is_found(cached):
    assert vae.find("mse") == cached


def test_a_snapshot_that_no_reference_names_is_told(cached):
    shutil.rmtree(cached.parents[1] / "refs")
    assert f"dataset.vae={cached}" in refused("mse")
    assert vae.find(str(cached)) == cached
    assert f"one inside of it does: dataset.vae={cached}" in refused(str(cached.parents[1]))


@pytest.mark.parametrize("name", [WEIGHTS.replace(".safe", ".fp16.safe"), "model.safetensors"])
def test_weights_under_another_name_are_told(cached, name):
    (cached / WEIGHTS).rename(cached / name)
    for line in (refused("mse"), refused(str(cached))):
        assert f"there is {name}, which would do under the name {WEIGHTS}" in line


def test_a_pickle_alone_is_told(cached):
    (cached / WEIGHTS).rename(cached / "diffusion_pytorch_model.bin")
    for line in (refused("mse"), refused(str(cached))):
        assert "only diffusion_pytorch_model.bin, a pickle of PyTorch" in line


def test_a_link_to_a_file_that_is_gone_is_told(cached):
    (cached / WEIGHTS).unlink()
    (cached / WEIGHTS).symlink_to("../../blobs/1234")
    assert f"{WEIGHTS} there is a link to a file that is gone" in refused("mse")


def test_weights_without_a_configuration_are_told(cached):
    (cached / CONFIG).unlink()
    assert "there is no config.json beside the weights" in refused(str(cached))


def test_the_folder_of_a_whole_pipeline_is_told(cached, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(cached, pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    assert f"one inside of it does: dataset.vae={pipeline / 'vae'}" in refused(str(pipeline))
    assert "there is notes.txt" in refused(str(empty_folder(tmp_path)))


def empty_folder(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    return tmp_path / "other"


def test_a_user_without_a_name_or_a_home(monkeypatch, tmp_path):
    """As in a container that is started with a number for a user."""
    import pwd

    from metrics import inception_weights

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "INCEPTION_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FileNotFoundError, match="neither mse, ema, none nor a folder"):
        vae.find("~/vae")
    with pytest.raises(FileNotFoundError, match="no Inception weights: .* into ~/.cache/meanflow"):
        inception_weights.find()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inception_weights, "read", lambda source: {})
    (tmp_path / "weights").write_text("x")
    assert inception_weights.load("weights") == {}
    assert os.listdir(tmp_path) == ["weights"]  # no folder of the name ~
