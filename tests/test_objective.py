"""The objective against a plain transcription of the equations, and against mathematics."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import plain
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import path
from methods.sampler import check_times, integrate, sample_times
from utils import iterator

CLASSES, SHAPE = 3, (2, 2, 1)
# A few sizes, so that jax compiles each operation a few times only.
sizes = st.sampled_from([1, 7, 8])
shares = st.sampled_from([0.0, 0.3, 0.75, 1.0])


def toy_params(seed=0, width=16):
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    size = int(np.prod(SHAPE))
    return {
        "z": jax.random.normal(next(keys), (size, width)) / size**0.5,
        "times": jax.random.normal(next(keys), (2, width)),
        "y": jax.random.normal(next(keys), (CLASSES + 1, width)),
        "out": jax.random.normal(next(keys), (width, size)) / width**0.5,
    }


def toy_net(params, z, t, h, y):
    """A network that depends on everything, not linearly."""
    x = z.reshape(len(z), np.prod(SHAPE)) @ params["z"] + jnp.stack([t, h], 1) @ params["times"]
    return (jnp.tanh(x + params["y"][y]) @ params["out"]).reshape(z.shape)


@partial(jax.jit, static_argnums=(0, 1))
def toy_batch(batch_size, method, seed):
    key_x, key_y, key = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(key_x, (batch_size, *SHAPE))
    y = jax.random.randint(key_y, (batch_size,), 0, CLASSES)
    return x, y, method.draw(key, x.shape, 0)


def value_and_grad(method, x, y, draws, net=toy_net):
    loss = partial(method.loss, make.as_net(net))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(toy_params(), x, {"y": y}, draws, {})


@settings(max_examples=8, deadline=None)
@given(
    batch_size=sizes,
    seed=st.integers(0, 2**16),
    method=st.builds(
        make.method,
        noise_dist=st.sampled_from(["logit_normal", "uniform"]),
        data_proportion=shares,
        class_dropout_prob=shares,
        guidance_eq=st.sampled_from(["none", "cfg", "cfg"]),
        omega=st.sampled_from([1.0, 0.2, 2.5]),
        kappa=st.sampled_from([0.0, 0.5, 0.92]),
        t_start=st.sampled_from([0.0, 0.3]),
        t_end=st.sampled_from([0.7, 1.0]),
        norm_p=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        norm_eps=st.sampled_from([0.01, 1e-3]),
        tangent=st.sampled_from([(0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]),
    ),
)
def test_equal_to_the_plain_transcription(batch_size, seed, method):
    @jax.jit
    def both(seed):
        x, y, draws = toy_batch(batch_size, method, seed)
        oracle = partial(plain.loss, make.as_net(toy_net))
        oracle = jax.value_and_grad(oracle, has_aux=True)
        return oracle(toy_params(), x, y, draws, method), value_and_grad(method, x, y, draws)

    ((expected, (error, v_loss)), expected_grads), ((found, rows), grads) = both(seed)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(rows["error"], error, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows["v_loss"], v_loss, rtol=1e-5)
    scale = jax.jit(optax.tree.norm)(expected_grads)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale + 1e-7)


# Mathematics ----------------------------------------------------------------------------------


def test_data_of_one_point_has_no_loss():
    """For a single x_0 the average velocity is (z - x_0) / t, at every r and t."""
    x_0 = jax.random.normal(jax.random.key(1), SHAPE)

    def exact(params, z, t, h, y):
        return (z - x_0) / path.by_row(t, z)

    method = make.method(data_proportion=0.5, norm_p=0.0)
    x, y, draws = toy_batch(16, method, 0)
    x = jnp.broadcast_to(x_0, x.shape)
    (loss, rows), _ = value_and_grad(method, x, y, draws, net=exact)
    np.testing.assert_allclose(rows["error"], 0, atol=1e-6)
    wrong = make.method(data_proportion=0.5, norm_p=0.0, tangent=(1.0, 0.0))
    _, rows = value_and_grad(wrong, x, y, draws, net=exact)[0]
    assert rows["error"].max() > 0.1


def test_r_equal_to_t_is_flow_matching():
    method = make.method(data_proportion=1.0, guidance_eq="none", norm_p=0.0, class_dropout_prob=0)
    x, y, draws = toy_batch(8, method, 0)
    np.testing.assert_array_equal(draws.r, draws.t)

    def flow_matching(params):
        z = (1 - path.by_row(draws.t, x)) * x + path.by_row(draws.t, x) * draws.noise
        v = toy_net(params, z, draws.t, jnp.zeros_like(draws.t), y)
        return jnp.mean(jnp.sum((v - (draws.noise - x)) ** 2, axis=(1, 2, 3)))

    expected = jax.value_and_grad(flow_matching)(toy_params())
    (found, _), grads = value_and_grad(method, x, y, draws)

    def close(found, expected):  # an entry is a sum of terms that are larger where it is small
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())

    jax.tree.map(close, (found, grads), expected)


def test_target_matches_finite_differences():
    """u_tgt = v - (t - r) du/dt, with du/dt along z_t at fixed r by central differences."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), toy_params())
        method = make.method(
            data_proportion=0.0, guidance_eq="none", class_dropout_prob=0, norm_p=0
        )
        x, y, draws = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a,
            toy_batch(8, method, 0),
        )
        t, r, noise, _ = draws
        u = lambda t: toy_net(  # noqa: E731
            params, x + path.by_row(t, x) * (noise - x), t, t - r, y
        )
        step = 1e-5
        du_dt = (u(t + step) - u(t - step)) / (2 * step)
        target = noise - x - path.by_row(t - r, x) * du_dt
        expected = np.sum((u(t) - target) ** 2, axis=(1, 2, 3))
        _, rows = method.loss(make.as_net(toy_net), params, x, {"y": y}, draws, {})
        np.testing.assert_allclose(rows["error"], expected, rtol=1e-7)


def test_no_gradient_flows_through_the_target():
    """The gradient is that of the squared distance to a fixed target."""
    method = make.method(data_proportion=0.5, norm_p=0.0)
    x, y, draws = toy_batch(8, method, 3)
    base = toy_params()
    expected = jax.grad(_distance_to_fixed_target)(base, base, x, y, draws, method)
    found = value_and_grad(method, x, y, draws)[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


def _distance_to_fixed_target(moved, base, x, y, draws, method):
    """mean |u(moved) - u_tgt(base)|^2 from the definition."""
    v = draws.noise - x
    z = x + path.by_row(draws.t, v) * v
    zero = jnp.zeros_like(draws.t)
    v_u = toy_net(base, z, draws.t, zero, jnp.full_like(y, CLASSES))
    v_c = toy_net(base, z, draws.t, zero, y)
    v_g = path.guided_velocity(v, v_u, v_c, *path.scales(method, draws.t), draws.drop)
    y = jnp.where(draws.drop, CLASSES, y)
    h = draws.t - draws.r
    one = jnp.ones_like(h)
    _, du_dt = jax.jvp(lambda z, t, h: toy_net(base, z, t, h, y), (z, draws.t, h), (v_g, one, one))
    u = toy_net(moved, z, draws.t, h, y)
    return jnp.mean(jnp.sum((u - v_g + path.by_row(h, u) * du_dt) ** 2, axis=(1, 2, 3)))


# Gaussian data: the average velocity in closed form --------------------------------------------

MEAN, STD = 1.0, 0.5


def gaussian_velocity(z, t, r):
    """u(z, t, r) for x ~ N(MEAN, STD^2): the flow carries z_t - m_t along sigma_t."""

    def moments(t):
        return (1 - t) * MEAN, np.sqrt(((1 - t) * STD) ** 2 + t**2)

    (m_t, s_t), (m_r, s_r) = moments(t), moments(r)
    return (z - (m_r + s_r / s_t * (z - m_t))) / (t - r)


def train_on_gaussian(tangent, steps=1500, batch_size=256, width=64):
    """Trains a small network on one-dimensional Gaussian data; returns its error, relative."""
    method = make.method(data_proportion=0.5, guidance_eq="none", norm_p=0.0, tangent=tangent,
                      class_dropout_prob=0.0, noise_dist="uniform")  # fmt: skip

    def net(params, z, t, h, y):
        x = jnp.stack([z[:, 0, 0, 0], t, h], axis=1)
        for layer in params[:-1]:
            x = nn_silu(x @ layer["w"] + layer["b"])
        return (x @ params[-1]["w"] + params[-1]["b"])[:, :, None, None]

    nn_silu = jax.nn.silu
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [3, width, width, width, 1]
    params = [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
        for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def step(carry, key):
        params, opt_state = carry
        key_x, key = jax.random.split(key)
        x = MEAN + STD * jax.random.normal(key_x, (batch_size, 1, 1, 1))
        draws, y = method.draw(key, x.shape, 0), jnp.zeros(batch_size, jnp.int32)
        loss = partial(method.loss, make.as_net(net))
        grads, _ = jax.grad(loss, has_aux=True)(params, x, {"y": y}, draws, {})
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(1), steps)
    # It runs for longer than it compiles.
    options = {"xla_backend_optimization_level": 2}
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0], compiler_options=options)
    params, _ = train((params, optimizer.init(params)))
    t, r = np.meshgrid(np.linspace(0.2, 1, 5), np.linspace(0, 0.8, 5))
    t, r = t[t > r + 0.1].astype(np.float32), r[t > r + 0.1].astype(np.float32)
    z = np.random.RandomState(0).normal(size=(200, 1)) * np.sqrt(((1 - t) * STD) ** 2 + t**2)
    z = (z + (1 - t) * MEAN).astype(np.float32)  # (200, pairs)
    t, r = np.broadcast_to(t, z.shape), np.broadcast_to(r, z.shape)
    u = net(params, z.reshape(-1, 1, 1, 1), t.ravel(), (t - r).ravel(), None).ravel()
    exact = gaussian_velocity(z, t, r).ravel()
    return float(np.sqrt(np.mean((u - exact) ** 2) / np.mean(exact**2)))


def test_gaussian_data_is_learned_and_a_wrong_tangent_does_not():
    right, wrong = train_on_gaussian((0.0, 1.0)), train_on_gaussian((1.0, 1.0))
    assert right < 0.1, right
    assert wrong > 3 * right, (right, wrong)


# Draws ----------------------------------------------------------------------------------------


@cache
def draw_of(batch_size, share):
    method = make.method(data_proportion=share)
    return jax.jit(lambda seed: method.draw(jax.random.key(seed), (batch_size, 1, 1, 1)))


@settings(max_examples=40, deadline=None)
@given(batch_size=st.sampled_from([1, 7, 64, 256]), share=shares, seed=st.integers(0, 999))
def test_share_and_order_of_times(batch_size, share, seed):
    t, r, noise, drop = jax.device_get(draw_of(batch_size, share)(seed))
    num_equal = int(batch_size * share)
    assert np.sum(t == r) == num_equal
    assert np.all(r <= t) and np.all(r >= 0) and np.all(t <= 1)
    differ, equal = path.split_rows(t - r, num_equal)
    assert np.all(differ > 0) and np.all(equal == 0)
    # dropped rows lie inside those with r = t while there is room
    dropped = np.asarray(drop)
    assert np.all((t == r)[dropped]) or dropped.sum() > num_equal


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 200), share=st.floats(0, 1))
def test_rows_split_and_merge(batch_size, share):
    num_equal = path.equal_count(batch_size, share)
    rows = np.arange(batch_size)  # nothing to compile for each size
    a, b = path.split_rows(rows, num_equal)
    assert len(b) == num_equal and len(a) + len(b) == batch_size
    np.testing.assert_array_equal(path.merge_rows(a, b), rows)


def logit_normal(mean, std):
    return lambda t: scipy.stats.norm(mean, std).cdf(np.log(t / (1 - t)))


@pytest.mark.parametrize(
    "options, cdf",
    [
        ({}, logit_normal(-0.4, 1.0)),
        ({"P_mean": 0.3, "P_std": 1.7}, logit_normal(0.3, 1.7)),
        ({"noise_dist": "uniform"}, lambda t: t),
    ],
)
def test_distributions_of_t_and_r(options, cdf):
    """t is the larger and r the smaller of two independent draws."""
    method = make.method(data_proportion=0.0, **options)
    draws = method.draw(jax.random.key(0), (20000, 1, 1, 1))
    t, r = np.asarray(draws.t, np.float64), np.asarray(draws.r, np.float64)
    assert scipy.stats.kstest(t, lambda x: cdf(x) ** 2).pvalue > 0.01
    assert scipy.stats.kstest(r, lambda x: 1 - (1 - cdf(x)) ** 2).pvalue > 0.01
    assert scipy.stats.kstest(np.asarray(draws.noise).ravel(), "norm").pvalue > 0.01


def test_second_distribution():
    method = make.method(data_proportion=0.0, P_mean=5.0, P_std=0.01, P_mean_r=-5.0, P_std_r=0.01)
    draws = method.draw(jax.random.key(0), (100, 1, 1, 1))
    assert np.all(draws.t > 0.99) and np.all(draws.r < 0.01)


@pytest.mark.parametrize("share", [0.75, 0.0, 0.05])
def test_number_of_dropped_labels(share):
    method = make.method(data_proportion=share, class_dropout_prob=0.1)
    keys = jax.random.split(jax.random.key(0), 2000)
    drop = jax.vmap(lambda key: method.draw(key, (64, 1, 1, 1)).drop)(keys)
    counts = np.asarray(drop.sum(axis=1))
    expected = scipy.stats.binom(64, 0.1)
    assert abs(counts.mean() - expected.mean()) < 4 * expected.std() / len(counts) ** 0.5
    assert abs(counts.var() / expected.var() - 1) < 0.15


def test_an_image_changes_kind_from_epoch_to_epoch():
    """Rows with r = t have fixed places in the batch, so the shuffle has to move the images."""
    num_records, batch_size = 256, 32
    kinds = []
    for epoch in range(4):
        start = epoch * num_records
        index = iterator.shuffled_indices(start, start + num_records, num_records, seed=0)
        assert sorted(index) == list(range(num_records))
        num_equal = path.equal_count(batch_size, 0.75)
        place = np.asarray(path.split_rows(jnp.arange(batch_size), num_equal)[1])
        kind = np.zeros(num_records, bool)
        for batch in index.reshape(-1, batch_size):
            kind[batch[place]] = True
        kinds.append(kind)
    for a, b in itertools.combinations(kinds, 2):
        # independent places: 2 * 3/4 * 1/4 of the images change
        assert abs(np.mean(a != b) - 0.375) < 0.12


# Sampler --------------------------------------------------------------------------------------


def test_one_step_is_exact_for_one_point_and_many_steps_agree():
    x_0 = jax.random.normal(jax.random.key(1), SHAPE)

    def exact(params, z, t, h, y):
        return (z - x_0) / path.by_row(t, z)

    noise, y = jax.random.normal(jax.random.key(2), (4, *SHAPE)), jnp.zeros(4, jnp.int32)
    for times in (sample_times(1), sample_times(3)):
        x = integrate(make.method(), make.as_net(exact), None, noise, {"y": y}, times)
        np.testing.assert_allclose(x, jnp.broadcast_to(x_0, x.shape), atol=1e-6)


def test_sampler_evaluates_the_network_once_per_step():
    calls = []

    def net(params, z, t, h, y):
        jax.debug.callback(lambda t, h: calls.append((float(t[0]), float(h[0]))), t, h)
        return jnp.zeros_like(z)

    noise, y = jnp.ones((2, *SHAPE)), jnp.zeros(2, jnp.int32)
    times = sample_times(0, (1.0, 0.6, 0.0))
    integrate(make.method(), make.as_net(net), None, noise, {"y": y}, times)
    jax.effects_barrier()
    np.testing.assert_allclose(calls, [(1.0, 0.4), (0.6, 0.6)], atol=1e-6)


@pytest.mark.parametrize("timesteps", [(1.0,), (0.9, 0.0), (1.0, 0.5, 0.5, 0.0)])
def test_bad_times_are_refused(timesteps):
    with pytest.raises(ValueError, match="sampling"):
        check_times(timesteps)


@pytest.mark.parametrize(
    "options", [{"noise_dist": "normal"}, {"guidance_eq": "CFG"}, {"data_proportion": 1.2},
                {"tangent": (1.0,)}]
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"method.{next(iter(options))}"):
        make.method(**options)
