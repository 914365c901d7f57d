"""Distances and their reference: closed forms, golden values, streamed moments against float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import plain_score
import pytest

from metrics import distances, neighbours
from metrics.reference import load_reference, save_reference

DIM = 24


def correlated(rng, n, dim=DIM, mean=3.0):
    """Samples whose mean is large against their spread, which is where sums lose digits."""
    mixing = rng.standard_normal((dim, dim)) * 0.9 ** np.arange(dim)[:, None]
    return (mean + rng.standard_normal((n, dim)) @ mixing).astype(np.float32)


def exact_moments(features):
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def stream(features, batch, acc=None, add=None):
    """Moments through the accumulator; the last batch is filled up with rows that do not count."""
    acc = distances.init_moments(features.shape[1]) if acc is None else acc
    add = add or jax.jit(distances.add_moments)
    for start in range(0, len(features), batch):
        part = features[start : start + batch]
        rows = np.full((batch, features.shape[1]), np.nan, np.float32)
        rows[: len(part)] = part
        acc = add(acc, rows, (np.arange(batch) < len(part)).astype(np.float32))
    return distances.finish_moments(acc)


def covariance(rng, dim=DIM):
    root = rng.standard_normal((dim, 2 * dim))
    return root @ root.T / (2 * dim)


# ------------------------------------------------------------------------------------- distance


def test_the_distance_of_a_set_with_itself_is_zero():
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(DIM), covariance(rng)
    assert abs(distances.frechet_distance(mu, sigma, mu, sigma)) < 1e-10
    few = exact_moments(correlated(rng, DIM // 3))  # fewer samples than dimensions
    assert abs(distances.frechet_distance(*few, *few)) < 1e-10


def test_known_changes_of_gaussian_moments_have_the_closed_form():
    rng = np.random.default_rng(1)
    mu, sigma, shift = rng.standard_normal(DIM), covariance(rng), rng.standard_normal(DIM)
    moved = distances.frechet_distance(mu, sigma, mu + shift, sigma)
    np.testing.assert_allclose(moved, np.sum(shift**2), rtol=1e-12)
    wider = distances.frechet_distance(mu, sigma, mu, 4 * sigma)  # (2 - 1)^2 tr S
    np.testing.assert_allclose(wider, np.trace(sigma), rtol=1e-12)
    a, b = rng.uniform(1, 2, DIM), rng.uniform(1, 2, DIM)
    diagonal = distances.frechet_distance(mu, np.diag(a), mu, np.diag(b))
    np.testing.assert_allclose(diagonal, np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=1e-10)


def test_the_distance_agrees_with_the_root_of_the_product():
    rng = np.random.default_rng(2)
    s1, s2 = covariance(rng), covariance(rng)
    cross = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
    expected = np.trace(s1) + np.trace(s2) - 2 * cross
    zero = np.zeros(DIM)
    np.testing.assert_allclose(distances.frechet_distance(zero, s1, zero, s2), expected, rtol=1e-10)
    assert distances.frechet_distance(zero, s1, zero, s2) == pytest.approx(
        distances.frechet_distance(zero, s2, zero, s1), rel=1e-12
    )


def test_a_covariance_that_rounding_made_indefinite():
    """Directions without variance, whose entries are what float32 leaves of zero."""
    sigma = np.diag([1.0, 1e-12, 1e-12])
    sigma[1, 2] = sigma[2, 1] = 1e-7
    mean = np.zeros(3)
    expected = np.trace(sigma) + 3 - 2 * (1 + 1e-7**0.5)
    found = distances.frechet_distance(mean, sigma, mean, np.eye(3))
    assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="infs or NaNs"):
        distances.frechet_distance(mean, sigma * np.nan, mean, np.eye(3))


def test_few_samples_have_no_distance_by_rounding():
    """Eigenvectors of all 256 directions, most of them rounding, are ten times further off."""
    rng = np.random.default_rng(0)
    few = [rng.normal(size=(20, 256)).astype(np.float32) + 3 * x for x in rng.random((2, 256))]
    roots = [(x - x.mean(0)).astype(np.float64) / 19**0.5 for x in np.float64(few)]
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    means = np.sum((np.float64(few[0]).mean(0) - np.float64(few[1]).mean(0)) ** 2)
    exact = means + sum(np.sum(x**2) for x in roots) - 2 * cross
    moments = [
        distances.finish_moments(jax.jit(distances.add_moments)(
            distances.init_moments(256), jnp.asarray(x), jnp.ones(20)
        ))
        for x in few
    ]  # fmt: skip
    assert distances.frechet_distance(*moments[0], *moments[1]) == pytest.approx(exact, rel=1e-7)


def test_moments_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        distances.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


@pytest.mark.parity
@pytest.mark.parametrize("name, kind", [("fid", "pool"), ("sfid", "spatial")])
def test_golden_distance(golden, name, kind):
    sets = np.load(golden / "inception" / "sets.npz")
    expected = json.loads((golden / "inception" / "expected.json").read_text())
    moments = [exact_moments(sets[f"{which}_{kind}"]) for which in ("gen", "ref")]
    assert abs(distances.frechet_distance(*moments[0], *moments[1]) - expected[name]) < 1e-3
    streamed = stream(sets[f"gen_{kind}"], 40)
    np.testing.assert_allclose(streamed[0], moments[0][0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(streamed[1], moments[0][1], atol=1e-6 * moments[0][1].max())


# -------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_streamed_moments_agree_with_two_passes_in_float64(batch):
    rng = np.random.default_rng(3)
    features = correlated(rng, 5000, mean=30.0)
    reference = exact_moments(correlated(rng, 5000, mean=30.01))
    exact, streamed = exact_moments(features), stream(features, batch)
    np.testing.assert_allclose(streamed[0], exact[0], rtol=1e-7)
    np.testing.assert_allclose(streamed[1], exact[1], atol=1e-6 * np.abs(exact[1]).max())
    distance = distances.frechet_distance(*exact, *reference)
    assert abs(distances.frechet_distance(*streamed, *reference) - distance) < 1e-6 * distance


def test_small_terms_after_a_large_one_are_not_lost():
    """Below half a unit in the last place of the sum a plain float32 sum would not move at all."""
    large, small, repeats = 100.0, 0.01, 10000
    rows, ones = jnp.array([[-1.0], [1.0]]), jnp.ones(2)
    acc = distances.add_moments(distances.init_moments(1), large * rows, ones)

    def step(acc, _):
        return distances.add_moments(acc, small * rows, ones), None

    acc, _ = jax.jit(lambda acc: jax.lax.scan(step, acc, length=repeats))(acc)
    expected = 2 * (large**2 + repeats * small**2) / (2 * (1 + repeats) - 1)
    np.testing.assert_allclose(distances.finish_moments(acc)[1], expected, rtol=1e-7)


def test_rows_without_weight_do_not_count():
    rng = np.random.default_rng(5)
    features = correlated(rng, 100)
    weight = (rng.random(100) < 0.5).astype(np.float32)
    features[weight == 0] = np.nan
    acc = jax.jit(distances.add_moments)(distances.init_moments(DIM), features, weight)
    mu, sigma = distances.finish_moments(acc)
    exact = exact_moments(features[weight > 0])
    assert acc.count == weight.sum()
    np.testing.assert_allclose(mu, exact[0], rtol=1e-6)
    np.testing.assert_allclose(sigma, exact[1], atol=1e-5)
    nothing = jax.jit(distances.add_moments)(acc, features, np.zeros(100, np.float32))
    np.testing.assert_array_equal(distances.finish_moments(nothing)[1], sigma)


def test_an_empty_first_batch_does_no_harm():
    rng = np.random.default_rng(6)
    features = correlated(rng, 50)
    acc = distances.add_moments(distances.init_moments(DIM), features, jnp.zeros(50))
    np.testing.assert_allclose(
        stream(features, 25, acc)[1], exact_moments(features)[1], rtol=1e-4, atol=1e-5
    )


def test_the_accumulators_can_be_donated():
    add = jax.jit(distances.add_moments, donate_argnums=0)
    rng = np.random.default_rng(7)
    stream(correlated(rng, 20), 10, add=add)
    add = jax.jit(distances.add_scores, donate_argnums=0)
    add(distances.init_scores(2, 5), jnp.zeros((4, 5)), jnp.array([0, 0, 1, 1]), jnp.ones(4))


def test_useless_moments_are_refused():
    with pytest.raises(ValueError, match="1 samples"):
        stream(np.zeros((1, 3), np.float32), 4)
    with pytest.raises(ValueError, match="not finite"):
        stream(np.full((4, 3), np.inf, np.float32), 4)


def test_moments_do_not_depend_on_the_devices(run_python):
    """Rows sharded over 8 devices, accumulators replicated or sharded: the same moments."""
    run_python(
        """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from metrics import distances
features = (3 + np.random.default_rng(0).standard_normal((640, 16))).astype(np.float32)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
assert mesh.size == 8
def run(rows, acc_sharding):
    add = jax.jit(distances.add_moments, out_shardings=acc_sharding)
    acc = distances.init_moments(16)
    for part in np.split(features, 10):
        weight = np.ones(64, np.float32)
        if rows is not None:
            part, weight = jax.device_put(part, rows), jax.device_put(weight, rows)
        acc = add(acc, part, weight)
    return distances.finish_moments(acc)
single = run(None, None)
sharded = distances.Moments(whole, whole, whole, whole, rows, rows)
exact = np.cov(features.astype(np.float64), rowvar=False)
for acc_sharding in (whole, sharded):
    mu, sigma = run(rows, acc_sharding)
    np.testing.assert_allclose(mu, single[0], rtol=1e-7)
    np.testing.assert_allclose(sigma, single[1], atol=1e-7)
    np.testing.assert_allclose(sigma, exact, atol=1e-7)
"""
    )


# ------------------------------------------------------------------------------- Inception score


def test_inception_score_of_certain_and_of_useless_predictions():
    certain = 50.0 * np.eye(6)[np.arange(60) % 6]
    np.testing.assert_allclose(plain_score.inception_score(certain, 2), (6, 0), atol=1e-6)
    np.testing.assert_allclose(
        plain_score.inception_score(np.zeros((20, 6)), 2), (1, 0), atol=1e-12
    )
    with pytest.raises(ValueError, match="cannot make 10 splits"):
        plain_score.inception_score(np.zeros((5, 6)))


@pytest.mark.parity
def test_golden_inception_score(golden):
    logits = np.load(golden / "inception" / "sets.npz")["gen_logits_no_bias"]
    expected = json.loads((golden / "inception" / "expected.json").read_text())["inception_score"]
    wanted, splits = (expected["mean"], expected["std"]), expected["splits"]
    np.testing.assert_allclose(plain_score.inception_score(logits, splits), wanted, rtol=1e-10)

    acc, n, batch = distances.init_scores(splits, logits.shape[1]), len(logits), 40
    add = jax.jit(distances.add_scores)
    for start in range(0, n, batch):
        index = np.arange(start, start + batch)
        rows = np.where((index < n)[:, None], logits[np.minimum(index, n - 1)], np.nan)
        acc = add(acc, rows, np.minimum(index, n - 1) * splits // n, index < n)
    np.testing.assert_allclose(distances.finish_scores(acc), wanted, rtol=1e-6)


# --------------------------------------------------------------------------- precision and recall


def test_precision_and_recall_of_known_sets():
    rng = np.random.default_rng(8)
    reference = rng.standard_normal((50, 4)).astype(np.float32)
    assert neighbours.precision_recall(reference, reference) == (1, 1)
    assert neighbours.precision_recall(reference, reference + 100) == (0, 0)
    # The generated samples are half of the reference: nothing is wrong, something is missing.
    line = np.arange(40, dtype=np.float32)[:, None]
    precision, recall = neighbours.precision_recall(line, line[:20])
    assert precision == 1 and recall == 23 / 40  # the balls of radius 3 reach samples 20 to 22
    with pytest.raises(ValueError, match="3 generated samples"):
        neighbours.precision_recall(reference, reference[:3])


def test_precision_and_recall_do_not_depend_on_the_block_size():
    rng = np.random.default_rng(9)
    reference = rng.standard_normal((70, 5)).astype(np.float32)
    generated = 0.3 + rng.standard_normal((60, 5)).astype(np.float32)
    whole = neighbours.precision_recall(reference, generated)
    assert neighbours.precision_recall(reference, generated, rows=16) == whole
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1


@pytest.mark.parity
def test_golden_precision_and_recall(golden):
    sets = np.load(golden / "inception" / "sets.npz")
    expected = json.loads((golden / "inception" / "expected.json").read_text())
    found = neighbours.precision_recall(sets["ref_pool"], sets["gen_pool"], expected["nearest_k"])
    np.testing.assert_allclose(found, (expected["precision"], expected["recall"]), rtol=1e-6)


# --------------------------------------------------------------------------- reference statistics


def test_reference_round_trip(tmp_path):
    rng = np.random.default_rng(10)
    mu, sigma = rng.standard_normal(4), covariance(rng, 4)
    mu_s, sigma_s = rng.standard_normal(3), covariance(rng, 3)
    save_reference(tmp_path / "a.npz", mu, sigma, mu_s, sigma_s, resize="tf1")
    read = load_reference(tmp_path / "a.npz")
    assert read["resize"] == "tf1" and list(tmp_path.iterdir()) == [tmp_path / "a.npz"]
    for name, value in (("mu", mu), ("sigma", sigma), ("mu_s", mu_s), ("sigma_s", sigma_s)):
        np.testing.assert_array_equal(read[name], value)
    np.savez(tmp_path / "b.npz", ref_mu=mu.astype(np.float32), ref_sigma=sigma)
    read = load_reference(tmp_path / "b.npz")
    assert read["mu"].dtype == np.float64 and read["mu_s"] is None
    assert read["resize"] == "half_pixel"
    np.testing.assert_array_equal(read["sigma"], sigma)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "need mu and sigma .* the file has mu"),
        ({"mu": np.zeros(3), "ref_sigma": np.eye(3)}, "need mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "should have the shapes"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu has values that are not finite"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "sigma has values"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "not symmetric"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(3)},
            "mu_s",
        ),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "not a readable npz"),
    ],
)
def test_bad_references_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}") as caught:
        load_reference(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_reference(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        load_reference(tmp_path / "none.npz")
    save_reference(tmp_path / "good.npz", np.zeros(50), np.eye(50))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:2000])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("cut.npz", "text.npz", "one.npy"):
        with pytest.raises(ValueError, match=f"{name}: not a readable npz") as caught:
            load_reference(tmp_path / name)
        assert "\n" not in str(caught.value)
