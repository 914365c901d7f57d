"""The autoencoder of Stable Diffusion, or none: image -> moments, x -> image. Arrays are NHWC.

Its network is the Flax class of diffusers (0.39 is the last release that has it). It is imported
where weights are loaded, so training never pays for it, and nothing else knows of it.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from models.codec import SD_NORMALISATION
from models.upsampling import doubled
from utils import files, identity, images, trees

REPOSITORIES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
STABLE_DIFFUSION = {  # the fields of config.json of both
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_flax_model.msgpack")
# What config.json may say to the Flax class; it does not know the other entries.
CONFIG_FIELDS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
)
# Names of the attention's products: in the Flax class (and in PyTorch files of before 2023, such
# as stabilityai/sd-vae-ft-mse), and in PyTorch files of today.
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Autoencoder(NamedTuple):
    """Images <-> x. `params` is an argument, so that a jit does not bake the weights in.

    params: nested dict of float32 numpy arrays; place them on the devices once.
    encode(params, images float (B, H, W, 3) in [-1, 1]) -> (mean, std), each float32
        (B, H / downscale, W / downscale, c), of the posterior, unscaled.
    decode(params, x float32 (B, h, w, c)) -> images float32 (B, h * downscale, w * downscale, C),
        near [-1, 1] but not clipped.
    identity: digests of its halves, `encoder` and `decoder`, and its `name`; {} without one.
    values: it decodes to numbers of any range, which are never rounded to bytes.
    """

    params: dict
    encode: Callable
    decode: Callable
    downscale: int
    dtype: str = "float32"  # of the products
    identity: dict = {}  # never changed
    values: bool = False

    def finished(self, params, x, rounding="nearest"):
        """Decodes x to images uint8 (B, H, W, C) in the `rounding` of `to_uint8`, or values."""
        decoded = self.decode(params, x)
        return decoded if self.values else images.to_uint8(decoded, rounding)


def load(name, normalisation=SD_NORMALISATION, dtype="float32") -> Autoencoder:
    """Loads the autoencoder that the option dataset.vae names. Never downloads.

    name: "mse" or "ema", looked up in the Hugging Face cache; a folder in the Hugging Face layout
        (config.json beside one of WEIGHT_FILES); or "none" for pixels, which are x.
    normalisation: that of the `Codec` of training; `decode` undoes it.
    dtype: of the products, float32 or bfloat16; group norms and results stay float32. How exact
        float32 products are on an accelerator follows jax.default_matmul_precision.
    Raises FileNotFoundError (files are missing), ValueError (they do not fit)."""
    if name == "none":
        return of_values()._replace(values=False)
    folder = find(name)
    config = _read_config(folder / "config.json")
    params = _read_params(folder, param_shapes(config))
    _check_scale(folder / "config.json", normalisation, config.get("latent_channels", 4))
    autoencoder = build(config, params, normalisation, dtype)
    return autoencoder._replace(identity={"name": str(name), **digests(config, params)})


def of_values(normalisation=None, ends=()) -> Autoencoder:
    """Makes what turns x back into values; `ends`: (low, high) that they are clipped to, or ()."""

    def encode(params, images):
        images = images.astype(jnp.float32)
        return images, jnp.zeros_like(images)

    def decode(params, x):
        values = x.astype(jnp.float32)
        values = normalisation.undo(values) if normalisation else values
        return values.clip(*ends) if ends else values

    return Autoencoder({}, encode, decode, downscale=1, values=True)


def digests(config, params):
    """Returns digests of the two halves: records depend on the encoder, images on the decoder.

    Autoencoders may share an encoder, as `mse` and `ema` do.
    """
    halves = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
    shape = sorted((k, v) for k, v in config.items() if k in CONFIG_FIELDS)
    return {
        half: identity.of_arrays({name: params[name] for name in names if name in params}, shape)
        for half, names in halves.items()
    }


def _check_scale(path, normalisation, channels):
    """Says where the normalisation, if it is the default one, is not what config.json asks for."""
    config = json.loads(path.read_text())
    scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if normalisation != SD_NORMALISATION:
        return
    if scale and (scale, shift) != (SD_NORMALISATION.scale[0], SD_NORMALISATION.shift[0]):
        logging.warning(
            "%s says scaling_factor %g and shift_factor %g; latents are multiplied by %g. For its "
            "own: dataset.latent_mean=%s dataset.latent_std=%s",
            path, scale, shift, SD_NORMALISATION.scale[0],
            ",".join([f"{shift:g}"] * channels), ",".join([f"{1 / scale:.6g}"] * channels),
        )  # fmt: skip
    elif config.get("latents_mean") or config.get("latents_std"):
        logging.warning(
            "%s says latents_mean and latents_std, which dataset.latent_mean and latent_std would "
            "take; latents are multiplied by %g", path, SD_NORMALISATION.scale[0]
        )  # fmt: skip


def build(config, params, normalisation=SD_NORMALISATION, dtype="float32") -> Autoencoder:
    """Builds the autoencoder of a configuration (the fields of config.json) and its parameters."""
    model = _flax_autoencoder(config, jnp.dtype(dtype))

    def encode(params, images):
        moments = model.apply({"params": params}, images, method=_moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))

    def decode(params, x):
        z = normalisation.undo(x)
        with nn.intercept_methods(_upsample_at_once):
            return model.apply({"params": params}, z, method=_image).astype(jnp.float32)

    downscale = 2 ** (len(model.block_out_channels) - 1)
    return Autoencoder(params, encode, decode, downscale, dtype)


# The class's own encode and decode work on NCHW outside; its parts are NHWC like ours.
def _moments(model, images):
    return model.quant_conv(model.encoder(images))


def _image(model, z):
    return model.decoder(model.post_quant_conv(z))


def _upsample_at_once(layer, args, kwargs, context):
    """Replaces the class's upsampling layers, which repeat pixels first, by `doubled`."""
    module = context.module
    if context.method_name != "__call__" or type(module).__name__ != "FlaxUpsample2D":
        return layer(*args, **kwargs)
    conv = module.variables["params"]["conv"]
    return doubled(*args, conv["kernel"], conv["bias"], module.dtype)


def find(name) -> Path:
    """Finds the folder that holds the files of the VAE `name` (not "none"), without the network.

    Raises FileNotFoundError with one line that says which files are needed, what is there, and
    what would do.
    """
    needs = f"needs config.json and one of {', '.join(WEIGHT_FILES)}"
    if name in REPOSITORIES:
        from huggingface_hub import constants

        repository = REPOSITORIES[name]
        there = "models--" + repository.replace("/", "--")
        folder = Path(constants.HF_HUB_CACHE, there)
        reference = folder / "refs" / "main"
        if reference.is_file():
            snapshot = folder / "snapshots" / reference.read_text().strip()
            if not _lack(snapshot):
                return snapshot
        raise FileNotFoundError(
            f"dataset.vae={name}: {repository} is not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}: {needs}{_what_is_cached(folder)}; run `hf download "
            f"{repository} config.json {WEIGHT_FILES[0]}` where there is a network, or set "
            "dataset.vae to a folder of them"
        )
    folder = files.local(files.user_path(name))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"dataset.vae={name}: neither {', '.join(REPOSITORIES)}, none nor a folder "
            f"in the Hugging Face layout ({needs})"
        )
    if lack := _lack(folder):
        raise FileNotFoundError(f"dataset.vae={name}: this folder {needs}; {lack}")
    return folder


def _what_is_cached(folder):
    """Says what the cache holds of a repository, which is not taken without being asked for."""
    for snapshot in sorted(folder.glob("snapshots/*")):
        if not _lack(snapshot):
            return f"; there is a snapshot that refs/main does not name: dataset.vae={snapshot}"
    return "".join(f"; in {path} {_lack(path)}" for path in sorted(folder.glob("snapshots/*"))[:1])


def _lack(folder):
    """Says why a folder is no VAE in Hugging Face's layout, and what would do; "" where it is."""
    if not folder.is_dir():
        return "there is no such folder"
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if "config.json" in there and there.intersection(WEIGHT_FILES):
        return ""
    inner = [folder / "vae", *sorted(folder.glob("snapshots/*"))]
    for path in inner:
        if path.is_dir() and not _lack(path):
            return f"one inside of it does: dataset.vae={path}"
    broken = sorted(p.name for p in folder.iterdir() if p.is_symlink() and not p.exists())
    if broken:
        return f"{broken[0]} there is a link to a file that is gone: download it again"
    if there.intersection(WEIGHT_FILES):
        return "there is no config.json beside the weights: take that of the same repository"
    others = sorted(n for n in there if n.endswith((".safetensors", ".msgpack")))
    if others:
        return f"there is {others[0]}, which would do under the name {WEIGHT_FILES[0]}"
    torch = sorted(n for n in there if n.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if torch:
        return (
            f"there is only {torch[0]}, a pickle of PyTorch: take {WEIGHT_FILES[0]} of the same "
            "repository, or write one with safetensors"
        )
    return f"there is {', '.join(sorted(there)[:5]) or 'nothing'}"


def _read_config(path):
    """Reads config.json: the keyword arguments for the Flax class."""
    try:
        config = json.loads(path.read_text())
        fields = {k: config[k] for k in CONFIG_FIELDS if k in config}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a configuration in JSON ({error})") from error
    blocks = [*fields.get("down_block_types", ()), *fields.get("up_block_types", ())]
    if not set(blocks) <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ValueError(f"{path}: block types {blocks} are not those of the Stable Diffusion VAE")
    if config.get("act_fn", "silu") != "silu":
        raise ValueError(f"{path}: act_fn is {config['act_fn']}; only silu is supported")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _flax_autoencoder(config, dtype=jnp.float32):
    # Each layer of the class warns of its removal; the pinned version is our answer to that.
    for module in ("vae_flax", "modeling_flax_utils"):
        logging.getLogger(f"diffusers.models.{module}").setLevel(logging.ERROR)
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    return FlaxAutoencoderKL(**config, dtype=dtype)


def param_shapes(config):
    """Returns the parameters of a configuration as a nested dict of `ShapeDtypeStruct`, float32."""
    model = _flax_autoencoder(config)
    side = 2 ** len(model.block_out_channels)
    images = jax.ShapeDtypeStruct((1, model.in_channels, side, side), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _read_params(folder, expected):
    """Reads the weights in `folder` for parameters of these shapes; checks each name and shape."""
    expected = trees.flatten(expected)
    path = next(folder / f for f in WEIGHT_FILES if (folder / f).exists())
    arrays = _read_weights(path)
    if path.suffix == ".safetensors":
        arrays = from_torch(arrays, expected)
    shapes = {name: leaf.shape for name, leaf in expected.items()}
    trees.check_shapes(shapes, arrays, f"{path} does not fit its config.json")
    return trees.unflatten({k: np.asarray(v, np.float32) for k, v in arrays.items()})


def _read_weights(path):
    """Reads {name: numpy array} as the file has them."""
    with files.reading(path, "damaged or not a weight file"):
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        return trees.flatten(serialization.msgpack_restore(path.read_bytes()))


def from_torch(tensors, expected):
    """Converts tensors of the PyTorch release to the names and axes of the Flax class.

    tensors: {"encoder.conv_in.weight": array, ...}; expected: {"encoder/conv_in/kernel": has
    .shape, ...}. Each tensor is used once; those that no expected name asks for keep their name.
    """
    left, arrays = dict(tensors), {}
    for name, leaf in expected.items():
        source = next((n for n in _torch_names(name) if n in left), None)
        if source is None:
            continue
        array = left.pop(source)
        if array.ndim == 4 and len(leaf.shape) == 2 and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]  # attention written as 1x1 convolutions
        # (out, in, kh, kw) -> (kh, kw, in, out), (out, in) -> (in, out)
        arrays[name] = np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array.T
    return arrays | left


def _torch_names(name):
    """Lists the PyTorch names under which a parameter of the Flax class may stand."""
    *modules, leaf = name.split("/")
    modules = [re.sub(r"_(\d+)$", r".\1", m) for m in modules]  # resnets_0 -> resnets.0
    leaf = "bias" if leaf == "bias" else "weight"
    last = modules[-1]
    choices = {last, ATTENTION_NAMES.get(last, last)}
    return [".".join([*modules[:-1], choice, leaf]) for choice in sorted(choices)]
