"""Weights of DINOv2: finding the file, reading either published form, making `dinov2`'s tree.

Known are Meta's `dinov2_vitl14_pretrain.pth` (and vits14, vitb14) and Hugging Face's
`model.safetensors` (`facebook/dinov2-large`, ...). No torch is needed, nothing is executed, and
the mapping is strict: each array is consumed once, each shape checked. Width, depth and table
follow from the file.
"""

import numpy as np

from formats import arrays as named_arrays
from formats import renames, state_dicts, torch_files, weight_files
from metrics import dinov2
from utils import files, trees

FILE_NAMES = (
    "dinov2_vitl14_pretrain.pth",
    "dinov2-large.safetensors",
    "dinov2_vitb14_pretrain.pth",
    "dinov2-base.safetensors",
)
NOT_OURS = "not the weights of DINOv2"
SIZES = {(384, 12): "ViT-S/14", (768, 12): "ViT-B/14", (1024, 24): "ViT-L/14"}  # width, depth


def load(path=None):
    """Returns the parameters of `dinov2.features`, numpy float32.

    `path` (option `fid.dinov2_weights`), else the environment variable DINOV2_WEIGHTS, else a file
    of one of FILE_NAMES in the cache folder.

    Raises:
      FileNotFoundError: which file is needed, and where.
      ValueError: a file of another network (one with registers is named), or a damaged one.
    """
    return read(find(path))


def find(path=None):
    """Returns the path of the file that `load` will read; raises FileNotFoundError."""
    advice = (
        f"no DINOv2 weights: put {FILE_NAMES[0]} (published with "
        "github.com/facebookresearch/dinov2), or the model.safetensors of facebook/dinov2-large "
        f"as {FILE_NAMES[1]}, into {files.cache_folder()}, or name a file in "
        "fid.dinov2_weights or DINOV2_WEIGHTS"
    )
    return weight_files.find(path, "fid.dinov2_weights", "DINOV2_WEIGHTS", FILE_NAMES, advice)


def name(params):
    """Returns the network's name for people, by its size."""
    depth, width = params["blocks"]["ls1"].shape
    return f"DINOv2 {SIZES.get((width, depth), f'of width {width}, depth {depth}')}"


def read(path):
    """Reads a weight file of either form, recognised by its content. Errors as `load`."""
    if named_arrays.is_safetensors(path):
        return convert(named_arrays.read(path), path, _from_huggingface)
    return convert(state_dicts.find(torch_files.load(path), path)[0], path)


def convert(arrays, where, rename=lambda arrays: arrays):
    """Turns {published name: array} into the tree of `dinov2.features`; `where` opens an error.

    `rename` brings the names of another form to those of the `.pth`.
    """
    if any(name.endswith("register_tokens") for name in arrays):
        raise ValueError(
            f"{where}: DINOv2 with registers (register_tokens), whose features are others; take "
            "the file without (dinov2_vitl14_pretrain.pth, facebook/dinov2-large)"
        )
    arrays = rename(arrays)
    table, depth = _table(arrays, where), renames.depth("blocks.{}.", arrays)
    ours = renames.to_ours(table, {"blocks": depth}, arrays, f"{where}: {NOT_OURS}")
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name} has values that are not finite")
    for name in ours:
        if name.endswith("/kernel"):  # (..., out, in) -> (..., in, out)
            ours[name] = np.ascontiguousarray(np.swapaxes(ours[name], -1, -2))
    kernel = arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0)  # OIHW -> HWIO
    kernel = np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]), np.float32)
    ours |= {"patch/kernel": kernel, "cls_token": ours["cls_token"][0, 0]}
    ours |= {"positions": ours["positions"][0]}
    del ours["mask_token"]
    return trees.unflatten(ours)


def _table(arrays, where):
    """Returns the table of `renames` for a network as wide as the arrays tell."""
    ndims = {"cls_token": 3, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    shapes = renames.shapes_of(arrays, ndims, NOT_OURS.removeprefix("not "), where)
    (_, _, width), (_, tokens, _), (mlp, _) = shapes
    side = round(max(tokens - 1, 1) ** 0.5)
    table = {
        "cls_token": (["cls_token"], (1, 1, width)),
        "mask_token": (["mask_token"], (1, width)),
        "positions": (["pos_embed"], (1, side * side + 1, width)),
        "patch/kernel": (["patch_embed.proj.weight"], (width, 3, dinov2.PATCH, dinov2.PATCH)),
        "patch/bias": (["patch_embed.proj.bias"], (width,)),
    }
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linears |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    for name, shape in linears.items():
        ours, theirs = f"blocks/{name.partition('.')[2]}", f"blocks.{{}}.{name}"
        table[f"{ours}/kernel"] = ([f"{theirs}.weight"], shape)
        table[f"{ours}/bias"] = ([f"{theirs}.bias"], shape[:1])
    norms = {"norm": "norm", "blocks/norm1": "blocks.{}.norm1", "blocks/norm2": "blocks.{}.norm2"}
    for ours, theirs in norms.items():
        table[f"{ours}/scale"] = ([f"{theirs}.weight"], (width,))
        table[f"{ours}/bias"] = ([f"{theirs}.bias"], (width,))
    return table | {f"blocks/ls{i}": ([f"blocks.{{}}.ls{i}.gamma"], (width,)) for i in "12"}


_HUGGINGFACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def _from_huggingface(arrays):
    """Renames the arrays of `model.safetensors` as in the `.pth`; unknown ones stay as they are."""
    renamed, thirds = {}, {}
    for name, value in arrays.items():
        parts = name.split(".")
        prefix, rest = "", name
        if parts[:2] == ["encoder", "layer"]:
            prefix, rest = f"blocks.{parts[2]}.", ".".join(parts[3:])
        if rest.startswith("attention.attention.") and len(parts) == 7:
            thirds.setdefault(f"{prefix}attn.qkv.{parts[6]}", {})[parts[5]] = value
            continue
        stem, _, leaf = rest.rpartition(".")
        rest = _HUGGINGFACE.get(rest) or f"{_HUGGINGFACE.get(stem, stem)}.{leaf}".lstrip(".")
        renamed[prefix + rest] = value
    for name, parts in thirds.items():
        if parts.keys() == {"query", "key", "value"}:
            renamed[name] = np.concatenate([parts["query"], parts["key"], parts["value"]])
    return renamed
