"""What a backbone is, and how everything else calls one.

A backbone is a Flax module that derives from `Network` and answers one call,
`module(z, c) -> Velocity`. What depends on the kind of network (how several batches share a pass,
which parameters may be rounded, what a pass costs) it overrides here, so nobody else has to ask
which one it is.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from utils import conditions


class Velocity(NamedTuple):
    """What a network predicts; each float32, like z."""

    u: jax.Array  # the average velocity over [r, t]
    v: jax.Array | None = None  # the instantaneous one, by a head of its own, where there is one


class Axes(NamedTuple):
    """What the axes of an array of parameters are; each a tuple of axis numbers."""

    stacked: tuple[int, ...]  # over which there are several arrays of one kind: blocks, classes
    into: tuple[int, ...]  # by which a product takes its input; () where the array is no kernel
    out: tuple[int, ...]  # by which its result leaves


class Network(nn.Module):
    """Base of all backbones. A subclass has `__call__`, and overrides what it does better.

    `conditions` names what it takes of `c` beside `t`, `h` and `y`, and `predicts_v` says whether
    it predicts the instantaneous velocity too: an objective that needs more of a network is refused
    when it is built (`parts.py`).
    """

    conditions = ()
    kinds = ()  # of the conditions of the data that it takes: vector | tokens | array
    given = ()  # those conditions, each a `utils.conditions.Condition`; a field where it takes some
    stacks = ()  # first names of the parameters that have a leading axis by block
    label_table = ""  # name of the parameters with a row for each class and a last one for none
    predicts_v = False
    takes_t = True  # whether it is told t beside h
    takes_through = True  # whether `together` can be differentiated through a tangent
    # First names of the parameters that only training needs; weights without them are sampled from.
    only_for_training = ()

    def __call__(self, z, c):
        """Predicts the velocity.

        Args:
          z: what goes into the network, float32 (B, ..., C).
          c: conditions by row: `t`, `h` float32 (B,) in [0, 1] with h = t - r; `y` int32 (B,),
            whose last value stands for no label, or weights over all values (`embed_labels`); and
            what the objective or the data add (models/conditions.py).

        Returns:
          `Velocity`.
        """
        raise NotImplementedError

    def blank(self, name):
        """Makes a row of the condition `name`, of `conditions`, to make parameters with."""
        return jnp.zeros(1)

    def together(self, *batches, jvp=None, through=False):
        """Computes a `Velocity` for each of several batches (z, c) in one pass over the parameters.

        Args:
          jvp: index of the batch that is under `jax.jvp`, so that every operation on it needs a
            forward-mode derivative; None: there is none.
          through: whether a gradient flows through its tangent, which is then differentiated
            forward and backward; the forms for half precision with derivatives of their own forbid
            that. Else nobody differentiates the tangent.
        """
        return tuple(self(*batch) for batch in batches)

    def serving(self, conditions, v):
        """Returns the network that takes `conditions` and, where `v`, predicts v, as far as it can.

        Args:
          conditions: names of those that objective and data give beside t, h and y.
          v: whether the objective asks for it.
        """
        return self

    def taking(self, given):
        """Returns the network that takes the conditions of the data, a tuple of `Condition`.

        Raises:
          ValueError: it takes none of that kind.
        """
        for one in given:
            if one.kind not in self.kinds:
                known = f"only {' and '.join(self.kinds)}" if self.kinds else "none at all"
                raise ValueError(
                    f"model.cls: {type(self).__name__} takes no condition of the kind {one.kind}, "
                    f"{known}; dataset.conditions {one.name} is {one}"
                )
        return self.clone(given=given) if given else self

    def cast(self, params):
        """Casts the parameters to the type of their products, once for all passes of a step."""
        return params

    def axes(self, params):
        """Tells the axes of every array: a tree like `params`, of `Axes`.

        Kernels are flax's, their last axis goes out and all before go in; any other array is a
        vector, or a stack of vectors (a table of labels, learned tokens).
        """

        def axes_of(path, a):
            names = [key.key for key in path]
            first = int(names[0] in self.stacks)
            rest, out = tuple(range(first, a.ndim - 1)), (a.ndim - 1,)
            if names[-1] == "kernel":
                return Axes(tuple(range(first)), rest, out)
            return Axes((*range(first), *rest), (), out)

        return jax.tree_util.tree_map_with_path(axes_of, params)

    def flops(self, image_shape, both=False):
        """Counts the FLOPs of the products of one pass on an image (h, w, c); None: not known.

        Args:
          both: of a pass that predicts u and v; else one of them.
        """
        return None

    def unrolled(self):
        """Returns the network without a loop, for counting: XLA counts the body of a loop once."""
        return self


def embed_labels(table, y):
    """Embeds labels y by a label table, float32 (B, D).

    Args:
      table: `nn.Embed` with a row for each of K classes and a last one for no label.
      y: labels int32 (B,), or float32 (B, K + 1): weights over the rows, whose mixture it is; that
        of weights 0 and a single 1 is the row itself.
    """
    if jnp.ndim(y) == 1:
        return table(y)
    return jnp.dot(y, table.embedding, precision="highest")


def init_params(module, key, image_shape):
    """Makes fresh parameters for images of shape (h, w, c). Pure, for `jit` and `eval_shape`."""
    zero = jnp.zeros(1)
    c = {"t": zero, "h": zero, "y": jnp.zeros(1, jnp.int32)}
    c |= {name: module.blank(name) for name in module.conditions}
    c |= conditions.blank(module.given)
    return module.init(key, jnp.zeros((1, *image_shape)), c)["params"]


def param_shapes(module, image_shape):
    """Returns the tree of `init_params` as `ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0), image_shape))


def function(module):
    """Makes the function that objectives and the sampler call of a `Network`.

    Returns:
      `net(params, *batches, jvp=None, through=False, key=None) -> (Velocity, ...)`; a batch is
      (z, c), see `Network`; a key turns dropout on, the same for all batches of the call.
      Parameters are best cast and gathered before (`parts.Parts.gather`), once for all calls.
    """

    def net(params, *batches, jvp=None, through=False, key=None):
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        how = {"jvp": jvp, "through": through}
        return module.apply({"params": params}, *batches, **how, method="together", **rngs)

    return net


def sides(size):
    """Returns (height, width) of a size that is one number or both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def sizes_of(cls, named, names, options, image_shape):
    """Chooses the sizes of a transformer of patches: name -> number.

    Args:
      cls: `model.cls`, for the error lines.
      named: the sizes that this name stands for, maybe none.
      names: all sizes that are needed, `patch_size` among them.
      options: those asked for; 0: that of `cls`.
      image_shape: (h, w, c) of z; h and w have to be multiples of the sides of a patch.

    Raises:
      ValueError: a size that neither gives, or patches that do not fill the image.
    """
    sizes = {name: options[name] or named.get(name, 0) for name in names}
    missing = [f"model.{name}" for name in names if not sizes[name]]
    if missing:
        raise ValueError(f"model.cls: {cls} needs {', '.join(missing)}")
    (height, width, _), (p, q) = image_shape, sides(sizes["patch_size"])
    if height % p or width % q:
        size = height if height == width else f"{height} x {width}"
        raise ValueError(
            f"dataset.image_size ({size}) must be a multiple of the patch size "
            f"{p if p == q else f'{p} x {q}'} of model.cls {cls}"
        )
    return sizes
