"""What the parts of a run refuse, and networks that are not trained."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

import parts
import train
from methods import flow
from models import frozen as frozen_networks
from models import unet
from run import config as run_config
from utils import sharding


@pytest.mark.parametrize(
    "word, line",
    [
        ("method.name=other", "method.name: 'other' is not one of meanflow | "),
        (
            "method.name=flow method.tangent=1,1",
            "method.tangent is no option of method.name flow, which has noise_dist, ",
        ),
        ("model.cls=DiT_B_3", "model.cls: unknown network 'DiT_B_3'; known: DiT_S_2, "),
        ("model.cls=DiT", "model.cls: DiT needs model.depth, model.hidden_size, model.num_heads, "),
        (
            "sampling.method=rk4",
            "sampling.method is of ode | euler | heun | consistency, not 'rk4'",
        ),
        ("sampling.omega=2", "sampling.omega: the guidance of method.name meanflow is trained in"),
    ],
)
def test_what_a_part_does_not_have_is_refused_by_name(word, line):
    with pytest.raises(ValueError) as caught:
        run_config.settle(make.config(*word.split()), "nowhere", {})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_network_is_told_the_conditions_of_objective_and_data(monkeypatch):
    told = []
    monkeypatch.setattr(unet.UNet, "serving", lambda net, names, v: told.append((names, v)) or net)
    words = [*make.NETWORKS["UNet"], "model.augment_dim=6", "dataset.augment_prob=0.1"]
    parts.make(make.config(*make.PIXELS, *words))
    assert told[-1] == (("augment",), False)


class Judged(flow.Flow):
    """Flow matching whose loss is what a frozen network says of the prediction."""

    frozen = ("judge",)

    def loss(self, net, params, x, given, draws, held):
        u = self.velocity(net, params, draws.noise, draws.t, draws.t, given)
        error = jnp.sum(held["judge"](u) ** 2, axis=1)
        return jnp.mean(error), {"error": error, "v_loss": error}


def test_a_frozen_network_is_an_argument_of_the_step(monkeypatch):
    """Its parameters are no constants of the program, and a gradient flows through it."""
    judge = frozen_networks.Frozen(
        apply=lambda params, x: x.reshape(len(x), -1) @ params["kernel"],
        load=lambda: {"kernel": np.eye(16, dtype=np.float32)},
        shapes=None,
    )
    monkeypatch.setitem(parts.FROZEN, "judge", judge)
    monkeypatch.setitem(parts.OBJECTIVES, "flow", Judged)
    config = make.config(*make.PIXELS, *make.NETWORKS["flow"], "training.batch_size=8")
    model = parts.make(config)
    recipe, _ = train.make_recipe(config.training, model, 10)
    state = train.fresh_state(recipe, make.params(model.module, model.image_shape))
    state, shardings = jax.device_get(state), sharding.by_parameter(model.mesh, state)
    step = train.make_step(recipe, jax.random.key(0), model.mesh, shardings)
    batch = {"image": np.zeros((8, 4, 4, 1), np.uint8), "label": np.zeros(8, np.int32)}

    def sums(scale):
        frozen = jax.tree.map(lambda a: a * np.float32(scale), parts.load_frozen(model))
        return jax.device_get(step(sharding.place(state, shardings), batch, frozen).sums)

    one, two = sums(1), sums(2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], 4 * one[name], rtol=1e-4)
    assert one["grad_norm"] > 0 and step._cache_size() == 1
