"""Flow matching: the second objective, through the same commands and with its own sampler."""

import jax
import jax.numpy as jnp
import jobs
import make
import numpy as np
import pytest

from methods import objective, path
from methods.sampler import integrate, sample_times

OPTIONS = {
    "method.name": "flow",
    "sampling.method": "heun",
    "sampling.num_steps": 20,
    "training.num_steps": 8,
}


def test_it_trains_evaluates_and_samples(tmp_path):
    runs, evaluation = jobs.Jobs(tmp_path), tmp_path / "evaluation"
    runs.run_here(tmp_path / "whole", OPTIONS)
    sweep = {"eval_only": True, "load_from": tmp_path / "whole", "sampling.omega": "1,300"}
    runs.run_here(evaluation, OPTIONS | sweep)  # so few steps have learned little of the classes
    results = jobs.results(evaluation)
    assert [result["omega"] for result in results] == [1, 300]
    assert results[0]["fid"] != results[1]["fid"]
    assert {result["sampling_method"] for result in results} == {"heun"}
    assert results[0]["fid"] == pytest.approx(jobs.results(tmp_path / "whole")[-1]["fid"], rel=1e-4)
    sampled = {"sample_only": True, "sampling.num_images": 4, "sampling.omega": 2}
    runs.run_here(tmp_path / "whole", OPTIONS | sampled)
    assert len(list((tmp_path / "whole" / "samples" / "step_8").glob("*_class*.png"))) == 4


@pytest.mark.slow
def test_it_goes_on_bit_for_bit(tmp_path):
    runs, alone = jobs.Jobs(tmp_path), OPTIONS | jobs.STEPS_ALONE
    runs.run_here(tmp_path / "whole", OPTIONS)
    for steps in (4, 8):
        runs.run_here(tmp_path / "stopped", alone | {"training.num_steps": steps})
    found, expected = jobs.checkpoints(tmp_path / "stopped"), jobs.checkpoints(tmp_path / "whole")
    for key in (key for key in expected if key[0] == 8 and not isinstance(expected[key], dict)):
        np.testing.assert_array_equal(found[key], expected[key], err_msg=str(key))


def exact(params, z, t, h, y):
    """The velocity of x ~ N(label, 0.5^2)."""
    mean, t = y[:, None, None, None], path.by_row(t, z)
    variance = ((1 - t) * 0.5) ** 2 + t**2
    return (t - (1 - t) * 0.25) / variance * (z - (1 - t) * mean) - mean


def test_heun_is_of_second_order_and_euler_of_first():
    net, method = make.as_net(exact), make.method("flow")
    noise = jax.random.normal(jax.random.key(0), (64, 1, 1, 1))
    y = jnp.ones(64, jnp.int32)

    def error(sampler, steps):
        times = sample_times(steps)
        x = integrate(method, net, None, noise, {"y": y}, times, sampler=sampler)
        return float(jnp.abs(x - (1 + 0.5 * noise)).max())

    assert 1.7 < error("euler", 40) / error("euler", 80) < 2.3
    assert error("heun", 40) / error("heun", 80) > 3.3
    assert error("heun", 40) < 0.1 * error("euler", 40)


def test_guidance_goes_beyond_the_class_inside_its_interval():
    net, method = make.as_net(exact), make.method("flow", num_classes=3)
    noise, y = jnp.zeros((2, 1, 1, 2)), jnp.ones(2, jnp.int32)  # the null label is 3
    times = sample_times(50)

    def sample(omega, t_min=0.0, t_max=1.0, channels=0):
        numbers = map(np.float32, (omega, t_min, t_max))
        guidance = objective.Guidance(*numbers, np.int32(channels))
        x = integrate(method, net, None, noise, {"y": y}, times, guidance=guidance)
        return x[0, 0, 0]

    plain = integrate(method, net, None, noise, {"y": y}, times)[0, 0, 0]
    np.testing.assert_allclose(sample(1.0), plain, atol=1e-6)
    assert np.all(sample(2.0) < plain - 0.5)  # away from the mean of the null label, 3
    np.testing.assert_allclose(sample(2.0, 0.705, 0.715), plain, atol=1e-6)  # no step begins there
    first, second = sample(2.0, channels=1)
    assert first < plain[0] - 0.5 and abs(second - plain[1]) < 1e-6
