"""Writes weights of the FID network, named as by torch-fidelity, in the formats that people have.

The names of each format are spelled out here once more, so that they are tested against something.
"""

import importlib.util
import pickle
import struct

import numpy as np
from torch_writer import Module, write_legacy, write_zip


def random_weights(folder):
    """The module that makes random weights and images, out of the golden folder."""
    spec = importlib.util.spec_from_file_location("random_weights", folder / "random_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BN = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def fold_gamma(weights):
    """The same network with gamma 1: what NVIDIA's file holds has none."""
    folded = dict(weights)
    for name, gamma in weights.items():
        if name.endswith("bn.weight"):
            layer = name.removesuffix(".bn.weight")
            var = weights[f"{layer}.bn.running_var"].astype(np.float64)
            var = (var + 1e-3) / gamma.astype(np.float64) ** 2 - 1e-3
            folded[f"{layer}.bn.running_var"] = var.astype(np.float32)
            folded[name] = np.ones_like(gamma)
    return folded


# The scopes of the graph of 2015, in the order in which the golden weights list the layers.
TOWERS = {
    "a": "conv tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_2/conv",
    "b": "conv tower/conv tower/conv_1 tower/conv_2",
    "c": "conv tower/conv tower/conv_1 tower/conv_2 tower_1/conv tower_1/conv_1 tower_1/conv_2 "
    "tower_1/conv_3 tower_1/conv_4 tower_2/conv",
    "d": "tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3",
    "e": "conv tower/conv tower/mixed/conv tower/mixed/conv_1 tower_1/conv tower_1/conv_1 "
    "tower_1/mixed/conv tower_1/mixed/conv_1 tower_2/conv",
}
SCOPES = ["conv", *(f"conv_{i}" for i in range(1, 5))] + [
    f"mixed_{i}/{tower}" if i else f"mixed/{tower}"
    for i, kind in enumerate("aaabccccdee")
    for tower in TOWERS[kind].split()
]


def scopes(weights):
    """(layer, scope) pairs."""
    layers = [n.removesuffix(".conv.weight") for n in weights if n.endswith(".conv.weight")]
    return zip(layers, SCOPES, strict=True)


def nest(flat):
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def as_modules(tree):
    return Module({k: as_modules(v) if isinstance(v, dict) else v for k, v in tree.items()})


def write_pth(path, weights):
    write_zip(path, weights)


def write_pth_with_counters(path, weights):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    write_legacy(path, weights | counters)


def write_nvidia(path, weights):
    weights = fold_gamma(weights)
    flat = {"output.weight": weights["fc.weight"], "output.bias": weights["fc.bias"]}
    for layer, scope in scopes(weights):
        block, _, rest = scope.partition("/")
        rest = rest.replace("/", "_" if block in ("mixed_9", "mixed_10") else ".")
        module = ".".join(filter(None, ("layers", block, rest)))
        flat[f"{module}.weight"] = weights[f"{layer}.conv.weight"]
        flat[f"{module}.beta"] = weights[f"{layer}.bn.bias"]
        flat[f"{module}.mean"] = weights[f"{layer}.bn.running_mean"]
        flat[f"{module}.var"] = weights[f"{layer}.bn.running_var"]
    tree = nest(flat)
    tree["layers"]["pool0"] = {"training": False}
    write_zip(path, as_modules(tree | {"training": False}), script=True)


def jax_fid_tree(weights):
    flat = {"fc.kernel": weights["fc.weight"].T, "fc.bias": weights["fc.bias"]}
    for name, value in weights.items():
        layer, kind, leaf = name.rsplit(".", 2) if not name.startswith("fc.") else ("", "", "")
        if kind == "conv":
            flat[f"{layer}.conv.kernel"] = value.transpose(2, 3, 1, 0)
        elif kind == "bn":
            flat[f"{layer}.bn.{BN[leaf]}"] = value
    return nest(flat)


def write_jax_fid(path, weights):
    path.write_bytes(pickle.dumps(jax_fid_tree(weights), 4))


def message(*fields):
    """A protobuf message of (number, value) pairs: int, float, str, bytes."""
    out = []
    for number, value in fields:
        if isinstance(value, float):
            out += [varint(number << 3 | 5), struct.pack("<f", value)]
        elif isinstance(value, int):
            out += [varint(number << 3), varint(value)]
        else:
            value = value.encode() if isinstance(value, str) else value
            out += [varint(number << 3 | 2), varint(len(value)), value]
    return b"".join(out)


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def constant(name, array):
    shape = message(*((2, message((1, n))) for n in array.shape))
    tensor = message((1, 1), (2, shape), (4, array.astype("<f4").tobytes()))
    attrs = [("dtype", message((6, 1))), ("value", message((8, tensor)))]
    return node(name, "Const", attrs)


def node(name, kind, attrs):
    entries = ((5, message((1, key), (2, value))) for key, value in attrs)
    return (1, message((1, name), (2, kind), (3, "input"), *entries))


def write_graph(path, weights, *, scale=True, epsilon=0.001):
    nodes = [
        node("Sub/y", "Const", [("value", message((8, message((1, 1), (5, b"\0\0\0C")))))]),
        constant("softmax/weights", weights["fc.weight"].T),
        constant("softmax/biases", weights["fc.bias"]),
        node("softmax/logits", "MatMul", [("transpose_a", message((5, 0)))]),
    ]
    graph = {"beta": "bias", "gamma": "weight"}
    graph |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    for layer, scope in scopes(weights):
        kernel = weights[f"{layer}.conv.weight"].transpose(2, 3, 1, 0)
        nodes.append(constant(f"{scope}/conv2d_params", kernel))
        for leaf, name in graph.items():
            nodes.append(constant(f"{scope}/batchnorm/{leaf}", weights[f"{layer}.bn.{name}"]))
        attrs = [
            ("variance_epsilon", message((4, float(epsilon)))),
            ("scale_after_normalization", message((5, int(scale)))),
        ]
        nodes.append(node(f"{scope}/batchnorm", "BatchNormWithGlobalNormalization", attrs))
    path.write_bytes(message(*nodes, (4, message((1, 9)))))


FORMATS = {
    "weights.pth": write_pth,
    "legacy.pth": write_pth_with_counters,
    "inception-2015-12-05.pt": write_nvidia,
    "classify_image_graph_def.pb": write_graph,
    "inception_v3_weights_fid.pickle": write_jax_fid,
}
