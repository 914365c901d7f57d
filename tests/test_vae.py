"""The way between images, records and the network (models/codec.py, models/vae.py)."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

import parts
from models import codec, hardware, vae
from utils import dataset

STYLES = ("tiny", "tiny_legacy_names")
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def io(golden):
    return dict(np.load(golden / "vae" / "tiny_io.npz"))


def moments_of(mean, std, batch=64):
    """Moments (batch, 4, 4, 2c) that are constant over rows and positions; mean, std (c,)."""
    row = np.concatenate([mean, std]).astype(np.float32)
    return np.broadcast_to(row, (batch, 4, 4, row.size))


# Codec


def encode(batch, key, **options):
    """x of a batch that may lack labels."""
    rows = len(next(iter(batch.values())))
    return codec.Codec(**options).encode({"label": np.zeros(rows, np.int32), **batch}, key)[0]


def test_latents_are_sampled_from_their_moments_and_scaled():
    mean, std = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    batch = {"moments": moments_of(mean, std, 4096), "label": np.zeros(4096)}
    x = jax.jit(encode)(batch, jax.random.key(0))
    assert x.shape == (4096, 4, 4, 2) and x.dtype == jnp.float32
    samples = np.asarray(x).reshape(-1, 2) / codec.SD_SCALE
    error = 5 * std / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - mean) < error)
    assert np.all(np.abs(samples.std(0) - std) < error)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.02


def test_each_key_gives_a_fresh_sample_and_the_same_key_the_same():
    batch = {"moments": moments_of([0.0], [1.0])}
    x = [encode(batch, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(x[0], x[1])
    assert abs(np.corrcoef(x[0].ravel(), x[2].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(x[0][0].ravel(), x[0][1].ravel())[0, 1]) < 0.9, "rows share their noise"


def test_latents_are_normalised_by_channel():
    mean, std = [1.0, -2.0], [0.5, 4.0]
    batch = {"moments": moments_of(np.array([1.5, 6.0]), np.zeros(2))}
    normalisation = codec.normalisation(mean, std, 2)
    x = encode(batch, jax.random.key(0), normalisation=normalisation)
    np.testing.assert_allclose(x, np.broadcast_to([1.0, 2.0], x.shape), rtol=1e-6)


def test_without_mean_and_std_the_factor_is_that_of_stable_diffusion():
    assert codec.normalisation((), [], 4) == codec.SD_NORMALISATION == codec.Codec().normalisation
    batch = {"moments": moments_of(np.ones(1), np.zeros(1))}
    np.testing.assert_allclose(encode(batch, jax.random.key(0)), 0.18215, rtol=1e-7)


@pytest.mark.parametrize(
    "mean, std, channels, named",
    [
        ([0.0], [], 1, "latent_std goes together"),
        ([], [1.0], 1, "latent_std goes together"),
        ([0.0, 0.0], [1.0], 2, "latent_std needs one number for each of the 2 channels"),
        ([0.0], [1.0, 1.0], 2, "latent_mean needs one number for each of the 2 channels"),
        ([0.0], [0.0], 1, "latent_std must be above 0"),
    ],
)
def test_a_normalisation_that_makes_no_sense_is_refused(mean, std, channels, named):
    with pytest.raises(ValueError, match=f"dataset.{named}"):
        codec.normalisation(mean, std, channels)


def test_labels_go_on_into_the_network_or_are_none():
    labels = np.array([2, 0, 1], np.int32)
    batch = {"image": np.zeros((3, 2, 2, 1), np.uint8), "label": labels}
    for labelled, expected in ((True, labels), (False, np.zeros(3))):
        _, given = codec.Codec(labelled=labelled).encode(batch, jax.random.key(0))
        assert given.keys() == {"y"} and given["y"].dtype == np.int32
        np.testing.assert_array_equal(given["y"], expected)


def test_half_precision_moments_are_sampled_in_float32():
    exact = {"moments": moments_of(np.array([0.5]), np.array([0.25]))}
    x = encode(exact, jax.random.key(0))
    for dtype in (np.float16, jnp.bfloat16):
        stored = {"moments": exact["moments"].astype(dtype)}
        np.testing.assert_array_equal(encode(stored, jax.random.key(0)), x)


def test_a_flip_chooses_the_moments_of_the_mirrored_image_row_by_row():
    batch = {
        "moments": moments_of(np.zeros(1), np.zeros(1), 1000),
        "moments_flipped": moments_of(np.ones(1), np.zeros(1), 1000),
    }
    x = np.asarray(encode(batch, jax.random.key(3), flip=True)) / codec.SD_SCALE
    flipped = x[:, 0, 0, 0].round()
    np.testing.assert_allclose(x, np.broadcast_to(flipped[:, None, None, None], x.shape), atol=1e-6)
    assert 400 < flipped.sum() < 600
    x = encode(batch, jax.random.key(3))
    np.testing.assert_array_equal(x, 0.0)


def test_the_flip_does_not_look_at_the_noise():
    """One number per image: with a shared key both would come from the same random bits."""
    moments = np.zeros((4096, 1, 1, 2), np.float32) + [0, 1]
    batch = {"moments": moments, "moments_flipped": moments + [100, 0]}
    z = np.asarray(encode(batch, jax.random.key(0), flip=True)).ravel() / codec.SD_SCALE
    flipped = z > 50
    assert abs(np.corrcoef(flipped, z - 100 * flipped)[0, 1]) < 0.08  # five standard deviations


def test_flipped_latents_that_are_not_there_are_asked_for(tmp_path):
    moments = moments_of(np.zeros(1), np.ones(1), 4)
    examples = ({"moments": row, "label": 0} for row in moments)
    count = dataset.write_shard(dataset.shard_path(tmp_path, "train", 0, 1), examples)
    shape = moments.shape[1:]
    dataset.write_metadata(tmp_path, "moments", shape, np.float32, 1, {"train": [count]})
    options = {"root": tmp_path, "image_size": shape[0], "image_channels": 1, "num_classes": 1}
    words = [f"dataset.{name}={value}" for name, value in options.items()]
    config = make.config(*words)
    assert parts.open_records(config.dataset, 4).num_records == 4
    with pytest.raises(ValueError, match="dataset.use_flip"):
        parts.open_records(make.config("dataset.use_flip", *words).dataset, 4)


def test_pixels_are_scaled_and_mirrored_along_the_width():
    image = np.random.default_rng(0).integers(0, 256, (200, 3, 5, 3), np.uint8)
    image[0, 0, 0] = (0, 255, 51)
    jitted = jax.jit(encode, static_argnames="flip")
    plain = np.asarray(jitted({"image": image}, jax.random.key(0)))
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, image.astype(np.float64) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(plain[0, 0, 0], [-1, 1, -0.6], atol=1e-6)
    x = np.asarray(jitted({"image": image}, jax.random.key(0), flip=True))
    same = (x == plain).all((1, 2, 3))
    mirrored = (x == plain[:, :, ::-1]).all((1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 70 < mirrored.sum() < 130


def test_the_draws_do_not_depend_on_the_devices(run_python, tmp_path):
    code = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import codec
rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
moments = np.random.default_rng(0).uniform(size=(16, 4, 4, 8)).astype(np.float32)
batch = {"moments": moments, "moments_flipped": moments + 10, "label": np.arange(16)}
batch = jax.device_put(batch, rows)
encode = jax.jit(codec.Codec(flip=True).encode, out_shardings=rows)
np.save(sys.argv[1], encode(batch, jax.random.key(0))[0])
"""
    script = tmp_path / "draw.py"
    script.write_text(code)
    draws = []
    for devices in (1, 4):
        out = tmp_path / f"{devices}.npy"
        run_python([script, out], devices=devices, env={"PYTHONPATH": "."})
        draws.append(np.load(out))
    np.testing.assert_allclose(draws[0], draws[1], rtol=1e-6, atol=1e-6)


# The autoencoder


@pytest.fixture(scope="module")
def autoencoders(golden):
    return {style: vae.load(str(golden / "vae" / style)) for style in STYLES}


@pytest.mark.parity
@pytest.mark.parametrize("style", STYLES)
def test_encode_gives_the_moments_of_the_pytorch_autoencoder(autoencoders, style, io):
    ours = autoencoders[style]
    with jax.default_matmul_precision("highest"):
        mean, std = jax.jit(ours.encode)(ours.params, io["images"])
    np.testing.assert_allclose(mean, io["mean"], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(std, io["std"], rtol=TOLERANCE, atol=TOLERANCE)
    assert io["images"].shape[1] == ours.downscale * mean.shape[1]


@pytest.mark.parity
@pytest.mark.parametrize("style", STYLES)
def test_decode_gives_the_images_of_the_pytorch_autoencoder(autoencoders, style, io):
    ours = autoencoders[style]
    with jax.default_matmul_precision("highest"):
        images = jax.jit(ours.decode)(ours.params, io["latents"] * codec.SD_SCALE)
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images, io["decoded"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parity
def test_decode_undoes_a_normalisation_by_channel(golden, io):
    channels = io["latents"].shape[-1]
    mean, std = np.linspace(-1, 1, channels), np.linspace(0.5, 2, channels)
    normalisation = codec.normalisation(tuple(mean), tuple(std), channels)
    ours = vae.load(str(golden / "vae" / STYLES[0]), normalisation=normalisation)
    x = ((io["latents"] - mean) / std).astype(np.float32)
    images = jax.jit(ours.decode)(ours.params, x)
    np.testing.assert_allclose(images, io["decoded"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parity
def test_bfloat16_stays_near_float32(golden, io):
    """Measured on the tiny network: 1.0 % of the images' standard deviation on average."""
    ours = vae.load(str(golden / "vae" / STYLES[0]), dtype="bfloat16")
    images = jax.jit(ours.decode)(ours.params, io["latents"] * codec.SD_SCALE)
    assert images.dtype == jnp.float32
    error = np.abs(images - io["decoded"]).mean() / io["decoded"].std()
    assert 1e-4 < error < 0.05, "above: too coarse; below: not bfloat16 at all"


@pytest.mark.parity
def test_flax_msgpack_and_1x1_convolutions_hold_the_same_weights(golden, autoencoders, tmp_path):
    expected = traverse_util.flatten_dict(autoencoders[STYLES[0]].params, sep="/")
    config = golden / "vae" / STYLES[0] / "config.json"
    tensors = load_file(golden / "vae" / STYLES[1] / vae.WEIGHT_FILES[0])
    for name, tensor in tensors.items():
        if ".attentions." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    (tmp_path / "torch").mkdir()
    save_file(tensors, tmp_path / "torch" / vae.WEIGHT_FILES[0])
    (tmp_path / "flax").mkdir()
    data = serialization.msgpack_serialize(autoencoders[STYLES[0]].params)
    (tmp_path / "flax" / vae.WEIGHT_FILES[1]).write_bytes(data)
    for form in ("torch", "flax"):
        shutil.copy(config, tmp_path / form)
        params = traverse_util.flatten_dict(vae.load(str(tmp_path / form)).params, sep="/")
        assert params.keys() == expected.keys()
        for name, array in expected.items():
            assert params[name].dtype == np.float32
            np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_doubled_is_the_convolution_of_repeated_pixels(monkeypatch, platform):
    monkeypatch.setattr(hardware, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 3, 6)), rng.normal(size=(3, 3, 6, 4))
    bias = rng.normal(size=4)
    repeated = np.pad(x.repeat(2, axis=1).repeat(2, axis=2), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(repeated, (3, 3), axis=(1, 2))
    expected = np.einsum("bijchw,hwcd->bijd", windows, kernel) + bias
    ours = vae.doubled(x, np.float32(kernel), np.float32(bias), jnp.float32)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    half = vae.doubled(x, np.float32(kernel), np.float32(bias), jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, expected, rtol=0.02, atol=0.2)


def test_the_decoder_repeats_no_pixels(autoencoders, io, monkeypatch):
    """Its layers that upsample are known by the name of their class, which a release may change."""
    ours, plain, sides = autoencoders[STYLES[0]], vae.doubled, []
    monkeypatch.setattr(
        vae, "doubled", lambda x, *rest: sides.append(x.shape[1]) or plain(x, *rest)
    )
    jax.eval_shape(lambda x: ours.decode(ours.params, x), io["latents"])
    side = io["latents"].shape[1]
    assert sides == [side * 2**i for i in range(int(np.log2(ours.downscale)))] != []


def test_pixels_need_no_weights():
    ours = vae.load("none")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)).astype(np.float32)
    mean, std = ours.encode(ours.params, x)
    np.testing.assert_array_equal(mean, x)
    np.testing.assert_array_equal(std, 0)
    np.testing.assert_array_equal(ours.decode(ours.params, x), x)
    assert ours.params == {} and ours.downscale == 1


# Bad files


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the tiny autoencoder to damage; `.tensors` are its weights, `.save` writes them."""
    shutil.copytree(golden / "vae" / STYLES[0], tmp_path / "vae")
    for path in (tmp_path / "vae").iterdir():
        path.chmod(0o644)
    weights = tmp_path / "vae" / vae.WEIGHT_FILES[0]
    return SimpleNamespace(path=tmp_path / "vae", weights=weights, tensors=load_file(weights))


def refusal(folder, kind=ValueError):
    """The line with which the folder is refused."""
    with pytest.raises(kind) as caught:
        vae.load(str(folder))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    return line


def test_a_missing_tensor_is_named(folder):
    del folder.tensors["decoder.conv_in.bias"]
    save_file(folder.tensors, folder.weights)
    assert "missing: decoder/conv_in/bias" in refusal(folder.path)


def test_a_left_over_tensor_is_named(folder):
    folder.tensors["decoder.conv_in.gain"] = np.zeros(3, np.float32)
    save_file(folder.tensors, folder.weights)
    assert "left over: decoder.conv_in.gain" in refusal(folder.path)


def test_both_name_styles_at_once_are_one_too_many(folder):
    name = "encoder.mid_block.attentions.0.to_q.weight"
    folder.tensors[name.replace("to_q", "query")] = folder.tensors[name]
    save_file(folder.tensors, folder.weights)
    assert "left over" in refusal(folder.path)


def test_a_tensor_of_another_shape_is_named(folder):
    folder.tensors["quant_conv.bias"] = np.zeros(3, np.float32)
    save_file(folder.tensors, folder.weights)
    assert "quant_conv/bias (3,) instead of" in refusal(folder.path)


def test_a_truncated_weight_file_is_named(folder):
    folder.weights.write_bytes(folder.weights.read_bytes()[:-100])
    assert folder.weights.name in refusal(folder.path)
    folder.weights.rename(folder.path / vae.WEIGHT_FILES[1])
    assert vae.WEIGHT_FILES[1] in refusal(folder.path)


def test_a_configuration_of_another_network_is_refused(folder):
    config = json.loads((folder.path / "config.json").read_text())
    for change in ({"act_fn": "gelu"}, {"up_block_types": ["AttnUpDecoderBlock2D"]}):
        (folder.path / "config.json").write_text(json.dumps(config | change))
        assert "config.json" in refusal(folder.path)
    (folder.path / "config.json").write_text("{")
    assert "config.json" in refusal(folder.path)


def test_missing_files_are_named(folder, tmp_path):
    folder.weights.unlink()
    line = refusal(folder.path, FileNotFoundError)
    assert all(name in line for name in ("config.json", *vae.WEIGHT_FILES))
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", FileNotFoundError)


# The Hugging Face cache


def find_in_process(run_python, home):
    """find("mse") in a process whose Hugging Face cache lies below `home`."""
    code = "from models import vae; print(vae.find('mse'))"
    return run_python(code, devices=1, env={"HF_HOME": str(home)}, check=False)


def test_published_weights_are_found_in_the_hugging_face_cache(run_python, golden, tmp_path):
    repository = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(golden / "vae" / STYLES[1], snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    done = find_in_process(run_python, tmp_path)
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_published_weights_that_are_not_there_are_asked_for_in_one_line(run_python, tmp_path):
    done = find_in_process(run_python, tmp_path)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and line.startswith("FileNotFoundError")
    for word in ("config.json", *vae.WEIGHT_FILES, "hf download stabilityai", str(tmp_path)):
        assert word in line


def test_training_does_not_import_diffusers(run_python):
    code = "import sys; from models import vae; print('diffusers' in sys.modules)"
    assert run_python(code, devices=1).stdout.strip() == "False"
