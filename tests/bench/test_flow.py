"""The paths, kernels and grids against golden numbers, diffusers' schedulers and exact Gaussian marginals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpobench.bench import flow
from gpobench.bench.flow import (
    Kernel,
    Path,
    Rectified,
    Step,
    cosine,
    cps,
    dance,
    ddim,
    ddim_grid,
    ddpm,
    dpm2,
    dynamic_grid,
    error_scale,
    linear_grid,
    mix,
    ode,
    path_shift,
    rectified,
    sde,
    shifted_grid,
    split,
    timestep,
    to_velocity,
    training_times,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2  # SD1.5, scaled_linear
SD15 = ddpm((1 - BETAS).cumprod(0))
PATHS: dict[str, Path] = {"rectified": rectified, "cosine": cosine, "ddpm": SD15}
NOISY: list[Kernel] = [sde(0.7), dance(0.3), cps(0.8), ddim(1.0)]
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Golden values: SD3.5-M, shift 3, ten steps (computed from the formulas of arXiv 2505.05470, 2509.05952 and 2505.07818)

SIGMAS = [1.0000, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
GOLDEN = [  # std, coefficient on x, on v (all a = 0.7), CPS std (0.8), Dance std (0.3), |on v| / std
    (0.7000, 0.7550, -0.0399, 0.9131, 0.0599, 0.0570),
    (0.7430, 0.7125, -0.0582, 0.8686, 0.0649, 0.0784),
    (0.5362, 0.8426, -0.0693, 0.8157, 0.0708, 0.1292),
    (0.4459, 0.8841, -0.0838, 0.7517, 0.0778, 0.1880),
    (0.3918, 0.9029, -0.1034, 0.6727, 0.0865, 0.2640),
    (0.3528, 0.9120, -0.1309, 0.5727, 0.0973, 0.3710),
    (0.3191, 0.9155, -0.1709, 0.4421, 0.1112, 0.5356),
    (0.2820, 0.9145, -0.2326, 0.2644, 0.1297, 0.8248),
    (0.2254, 0.9087, -0.3351, 0.0085, 0.1556, 1.4867),
    (0.0063, 0.9978, -0.0111, 0.0000, 0.0283, 1.7706),
]


def test_golden_grids():
    assert np.allclose(shifted_grid(10, 3.0), SIGMAS, atol=5e-5)
    fourteen = [
        1.0,
        0.9731,
        0.9430,
        0.9094,
        0.8715,
        0.8283,
        0.7787,
        0.7213,
        0.6539,
        0.5738,
        0.4769,
        0.3574,
        0.2062,
        0.0089,
        0,
    ]
    assert np.allclose(shifted_grid(14, 3.0), fourteen, atol=5.1e-5)


@pytest.mark.parametrize("k", range(10))
def test_golden_steps(k: int):
    grid = shifted_grid(10, 3.0)
    t, s, one, zero = grid[k : k + 1], grid[k + 1 : k + 2], torch.ones(1, 1), torch.zeros(1, 1)
    on_x, on_v = sde(0.7)(rectified, one, zero, t, s), sde(0.7)(rectified, zero, one, t, s)
    std = float(on_x.std)
    got = (
        std,
        float(on_x.mean),
        float(on_v.mean),
        float(cps(0.8)(rectified, one, zero, t, s).std),
        float(dance(0.3)(rectified, one, zero, t, s).std),
        abs(float(on_v.mean)) / std,
    )
    assert got == pytest.approx(GOLDEN[k], abs=1e-4)


def flow_grpo(v: Tensor, x: Tensor, sigma: float, sigma_next: float, sigma_1: float, a: float) -> tuple[Tensor, float]:
    """sd3_sde_with_logprob.py, line by line in float64: (mean, std_dev_t)."""
    dt = sigma_next - sigma
    std_dev_t = math.sqrt(sigma / (1 - (sigma_1 if sigma == 1 else sigma))) * a
    mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std_dev_t


@pytest.mark.parametrize("k", range(10))
def test_sde_is_flow_grpos_code(k: int):
    grid = shifted_grid(10, 3.0).double()
    x, v, to = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    mean, s = flow_grpo(v, x, float(grid[k]), float(grid[k + 1]), float(grid[1]), 0.7)
    step = sde(0.7)(rectified, x, v, grid[k].expand(2), grid[k + 1].expand(2))
    std = s * math.sqrt(grid[k] - grid[k + 1])
    assert torch.allclose(step.mean, mean, atol=1e-12)
    assert torch.allclose(step.std, torch.tensor(std, dtype=torch.float64), rtol=1e-12)
    logp = (-((to - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))).mean((1, 2))
    assert torch.allclose(step.logp(to), logp, rtol=1e-10)


# Times of training

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Of shift(sigmoid(normal)), in float64: t at each of QUANTILES, and P(t > .6).
TIME_LAWS = {
    1.0: ((0.16181, 0.33749, 0.5, 0.66251, 0.83819), 0.3426),
    3.0: ((0.36674, 0.60447, 0.75, 0.85484, 0.93954), 0.7559),
}


def normal_quantiles(q: Tensor) -> Tensor:
    return math.sqrt(2) * torch.special.erfinv(2 * q - 1)


@pytest.mark.parametrize("by", TIME_LAWS)
def test_golden_quantiles_of_the_times_of_training(by: float):
    quantiles, above = TIME_LAWS[by]
    at = normal_quantiles(torch.tensor(QUANTILES, dtype=torch.float64)).sigmoid()
    expected = torch.tensor(quantiles, dtype=torch.float64)
    assert torch.allclose(training_times(at, Rectified(by)), expected, atol=1e-5)
    assert torch.allclose(training_times(at, rectified, by=by), expected, atol=1e-5)  # a shift that is given
    assert torch.allclose(training_times(at, Rectified(5.0), by=by), expected, atol=1e-5)  # goes before the path's own
    grid = normal_quantiles((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).sigmoid()
    assert float((training_times(grid, Rectified(by)) > 0.6).double().mean()) == pytest.approx(above, abs=1e-4)


@pytest.mark.parametrize("by", [1.0, 3.0])
def test_the_law_of_training_is_that_of_the_published_scripts(by: float):
    """train_sd3_dpo.py of yifan123/flow_grpo, after diffusers' train_dreambooth_lora_sd3.py, on diffusers' own scheduler.

    It indexes the schedule, which falls, by floor(1000 u): its time at u is ours at 1 - u up to one entry of the table.
    """
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=by)
    size = scheduler.config.num_train_timesteps

    def published(u: Tensor) -> Tensor:
        timesteps = scheduler.timesteps[(u * size).long()]
        rows = [int((scheduler.timesteps == t).nonzero()) for t in timesteps]
        return scheduler.sigmas[rows].double()

    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    entry = 1.01 * max(by, 1 / by) / size  # the steepest part of the shift, times the width of an entry
    assert float((training_times(1 - u, Rectified(by)) - published(u)).abs().max()) < entry
    torch.manual_seed(0)
    drawn = compute_density_for_timestep_sampling("logit_normal", 20_000, logit_mean=0.0, logit_std=1.0)
    quantiles = torch.quantile(published(drawn), torch.tensor(QUANTILES, dtype=torch.float64))
    # at most five standard errors sqrt(q (1 - q) / n) / density of the draws, plus an entry
    assert torch.allclose(quantiles, torch.tensor(TIME_LAWS[by][0], dtype=torch.float64), atol=0.02)
    assert float(quantiles[2]) == pytest.approx({1.0: 0.5, 3.0: 0.75}[by], abs=0.01)


@pytest.mark.parametrize("by", [1.0, 2.2243, 3.0])
@pytest.mark.parametrize("t_min", [0.0, 0.01, 0.5625])
def test_times_of_training_fill_what_lies_above_the_lowest(by: float, t_min: float):
    """The ends go to t_min and 1, the order stays, and the lowest is cut off before the shift: DGPO's t_min is shift(0.3)."""
    t = training_times(torch.linspace(0, 1, 101, dtype=torch.float64), Rectified(by), t_min)
    assert float(t[0]) == pytest.approx(t_min) and float(t[-1]) == pytest.approx(1) and bool((t.diff() > 0).all())
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    if by == 3.0 and t_min == 0.5625:
        assert torch.allclose(training_times(u, Rectified(by), t_min), flow.shift(0.3 + 0.7 * u, 3.0))


def test_without_a_shift_the_times_are_the_draws_to_the_last_bit():
    """Models without a shift, as the embedded one, train as before there was one."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for t_min in (0.0, 0.5, 0.566, 0.6):
        expected = t_min + (1 - t_min) * u
        assert all(torch.equal(training_times(u, path, t_min), expected) for path in (rectified, SD15, cosine))


def test_only_a_schedule_with_a_shift_has_one():
    assert [path_shift(path) for path in (rectified, Rectified(3.0), SD15, cosine)] == [1, 3, 1, 1]
    t = torch.rand(5, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(rectified(t), Rectified(3.0)(t), strict=True))  # the path is the same


# Points, velocities, predictions


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PATHS)), st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 2**31))
def test_split_undoes_mix(name: str, times: list[float], seed: int):
    t = torch.tensor(times, dtype=torch.float64)
    x0, eps = normal(len(t), 2, 3, seed=seed), normal(len(t), 2, 3, seed=seed + 1)
    x, v = mix(PATHS[name], x0, eps, t)
    back = split(PATHS[name], x, v, t)
    assert torch.allclose(back[0], x0, atol=1e-9) and torch.allclose(back[1], eps, atol=1e-9)


@every_path
def test_the_derivatives_are_derivatives(path: Path):
    t, h = torch.linspace(0.0103, 0.9897, 50, dtype=torch.float64), 1e-7
    a, s, da, ds = path(t)
    up, down = path(t + h), path(t - h)
    assert torch.allclose((up[0] - down[0]) / (2 * h), da, rtol=1e-6)
    assert torch.allclose((up[1] - down[1]) / (2 * h), ds, rtol=1e-6)
    assert (a.diff() < 0).all() and (s.diff() > 0).all()


@every_path
@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v_prediction", "sample"])
def test_predictions_are_one_map_apart(path: Path, prediction: flow.Prediction):
    t = torch.tensor([0.03, 0.4, 0.77, 0.98], dtype=torch.float64)
    x0, eps = normal(4, 5), normal(4, 5, seed=1)
    x, v = mix(path, x0, eps, t)
    a, s = (c[:, None] for c in path(t)[:2])
    outs = {"velocity": v, "epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}
    assert torch.allclose(to_velocity(path, x, t, outs[prediction], prediction), v, atol=1e-10)
    # an error of the prediction and of its velocity differ by the stated factor
    off = normal(4, 5, seed=2)
    dv = to_velocity(path, x, t, outs[prediction] + off, prediction) - v
    assert torch.allclose((dv**2).sum(1) * error_scale(path, t, prediction), (off**2).sum(1), rtol=1e-6)


def test_error_scale_on_the_rectified_path():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(error_scale(rectified, t, "epsilon"), (1 - t) ** 2)
    assert torch.allclose(error_scale(rectified, t, "sample"), t**2)


@every_path
@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v_prediction", "sample"])
def test_predictions_stay_finite_at_the_ends(path: Path, prediction: flow.Prediction):
    t = torch.tensor([0.0, 1.0])
    assert to_velocity(path, torch.ones(2, 3), t, torch.ones(2, 3), prediction).isfinite().all()
    with pytest.raises(ValueError, match="unknown prediction"):
        to_velocity(path, torch.ones(2, 3), t, torch.ones(2, 3), "score")  # type: ignore


def test_the_table_is_met_exactly_and_its_ends_are_finite():
    abar = (1 - BETAS).cumprod(0).double()
    k = torch.arange(1000)
    a, s, da, ds = SD15((k + 1) / 1000)
    assert torch.allclose(a, abar.sqrt(), atol=2e-6) and torch.allclose(
        s, (1 - abar).sqrt(), atol=2e-6
    )  # float32 times
    assert torch.equal(timestep((k + 1) / 1000), k.float())
    assert [float(c) for c in SD15(torch.zeros(()))[:2]] == [1.0, 0.0]
    assert all(c.isfinite().all() for c in SD15(torch.tensor([0.0, 1.0])))
    assert torch.allclose(a * ds - da * s, torch.hypot(da, ds))  # the slope of the angle, positive
    assert ddpm([0.9, 0.5, 0.0])(torch.ones(1))[1] == 1  # a table that ends at zero SNR
    assert hash(SD15) == hash(ddpm((1 - BETAS).cumprod(0)))


@pytest.mark.parametrize("table", [[], [0.5, 0.6], [1.0, 0.5], [0.5, -0.1], [0.5, 0.5]])
def test_a_bad_table_is_refused(table: list[float]):
    with pytest.raises(ValueError, match="decrease"):
        ddpm(table)


# Laws of the kernels


def two(path: Path, t: float = 0.8, s: float = 0.6) -> tuple[Any, ...]:
    return path, normal(3, 4), normal(3, 4, seed=1), torch.full((3,), t), torch.full((3,), s)


@every_path
@pytest.mark.parametrize("kernel", [sde(0.0), dance(0.0), cps(0.0), ddim(0.0)], ids=repr)
@pytest.mark.parametrize("ts", [(1.0, 0.96), (0.8, 0.6), (0.02, 0.0)])
def test_without_noise_every_kernel_is_the_ode(path: Path, kernel: Kernel, ts: tuple[float, float]):
    args = two(path, *ts)
    step, ref = kernel(*args), ode(*args)
    assert torch.allclose(step.mean, ref.mean, atol=1e-12)
    assert (step.std == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_is_exact(dtype: torch.dtype):
    grid = shifted_grid(10).to(dtype)
    x, v = normal(4, 8, dtype=dtype), normal(4, 8, seed=1, dtype=dtype)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        assert torch.equal(ode(rectified, x, v, t.expand(4), s.expand(4)).mean, x + (s - t) * v)
        assert torch.equal(ode(rectified, x, v, t, s).mean, x + (s - t) * v)  # a time without a batch


@every_path
@pytest.mark.parametrize("kernel", [ode, *NOISY], ids=repr)
def test_the_ends_are_finite(path: Path, kernel: Kernel):
    x, v = normal(2, 3), normal(2, 3, seed=1)
    for t, s in [(1.0, 0.9), (0.1, 0.0), (1.0, 0.0), (1e-3, 0.0)]:
        step = kernel(path, x, v, torch.full((2,), t), torch.full((2,), s))
        assert step.mean.isfinite().all() and step.std.isfinite().all() and step.mean.dtype == torch.float64


@every_path
@pytest.mark.parametrize("kernel", [ode, cps(0.8), cps(1.0), ddim(1.0)], ids=repr)
def test_the_last_step_lands_on_x0(path: Path, kernel: Kernel):
    path, x, v, t, _ = two(path)
    step = kernel(path, x, v, t, torch.zeros(3))
    assert torch.allclose(step.mean, split(path, x, v, t)[0], atol=1e-12) and (step.std == 0).all()


@every_path
@pytest.mark.parametrize("kernel", [cps(0.3), cps(0.8), ddim(0.5), ddim(1.0)], ids=repr)
def test_total_noise_is_preserved(path: Path, kernel: Kernel):
    """With x0_hat = 0, mean = q eps_hat: q^2 + std^2 = sigma(s)^2."""
    t, s = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.7, 0.3, 0.1])
    x, v = mix(path, torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64), t)
    step = kernel(path, x, v, t, s)
    assert torch.allclose(step.mean**2 + step.std**2, path(s.double())[1][:, None] ** 2, atol=1e-12)


@every_path
def test_half_precision_is_raised(path: Path):
    path, x, v, t, s = two(path)
    for kernel in [ode, *NOISY]:
        low = kernel(path, x.bfloat16(), v.bfloat16(), t, s)
        high = kernel(path, x.bfloat16().double(), v.bfloat16().double(), t, s)
        assert low.mean.dtype == low.std.dtype == torch.float32
        assert torch.allclose(low.mean.double(), high.mean, atol=1e-6)
        assert low.logp(x.bfloat16()).dtype == torch.float32 if kernel != ode else True
    assert all(
        y.dtype == torch.float32 for y in (*mix(path, x.half(), v.half(), t), *split(path, x.half(), v.half(), t))
    )
    assert to_velocity(path, x.half(), t, v.half(), "epsilon").dtype == torch.float32


def test_kernels_can_be_recorded():
    assert [repr(k) for k in (ode, sde(0.7), cps(0.8), ddim(1.0), dance(0.3))] == [
        "Ode()", "Sde(noise_level=0.7)", "Cps(eta=0.8)", "Ddim(eta=1.0)", "Dance(eta=0.3)",
    ]  # fmt: skip
    assert sde(0.7) == sde(0.7) != sde(0.6) and len({sde(0.7), sde(0.7), ode}) == 2


def test_rows_do_not_touch_each_other():
    path, x, v, _, _ = two(rectified)
    t, s = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.9, 0.4, 0.0])
    for kernel in NOISY:
        whole = kernel(path, x, v, t, s)
        for i in range(3):
            one = kernel(path, x[i : i + 1], v[i : i + 1], t[i : i + 1], s[i : i + 1])
            assert torch.equal(one.mean, whole.mean[i : i + 1]) and torch.equal(one.std, whole.std[i : i + 1])


# Same marginals: Gaussian data, whose velocity is known exactly

CENTRE, WIDTH = 1.5, 0.5


def exact(path: Path, x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data N(CENTRE, WIDTH^2): E[alpha' x0 + sigma' eps | x]."""
    a, s, da, ds = path(t.double())
    var = a**2 * WIDTH**2 + s**2
    return da * CENTRE + (a * da * WIDTH**2 + s * ds) / var * (x - a * CENTRE)


def walk(path: Path, kernel: Kernel, steps: int, n: int) -> dict[float, Tensor]:
    """n scalars walked from the exact law at t = 1; those at t = 0.5 and t = 0."""
    rng, grid, kept = torch.Generator().manual_seed(1), linear_grid(steps).double(), {}
    a1, s1 = (float(c) for c in path(grid[:1])[:2])
    x = a1 * (CENTRE + WIDTH * torch.randn(n, 1, generator=rng)) + s1 * torch.randn(n, 1, generator=rng)
    x = x.double()
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x = kernel(path, x, exact(path, x, t), t, s).draw(torch.randn(n, 1, generator=rng))
        kept[round(float(s), 6)] = x
    return {s: kept[s] for s in (0.5, 0.0)}


@every_path
@pytest.mark.parametrize("kernel", [ode, sde(0.7), sde(math.sqrt(2)), dance(0.3), ddim(1.0)], ids=repr)
def test_kernels_keep_the_marginals(path: Path, kernel: Kernel):
    """Mean and spread are the path's own, to 4 standard errors and the bias of 200 steps."""
    n = 20_000
    for s, x in walk(path, kernel, 200, n).items():
        a, sig = (float(c) for c in path(torch.tensor(s, dtype=torch.float64))[:2])
        std = math.sqrt(a**2 * WIDTH**2 + sig**2)
        assert float(x.mean()) == pytest.approx(a * CENTRE, abs=4 * std / math.sqrt(n) + 0.01)
        assert float(x.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * n) + 0.02)


def test_cps_keeps_the_coefficients_and_not_the_marginals():
    """Its noise does not vanish with the step, so more steps do not bring back the spread of the data."""
    for steps in (20, 200):
        assert float(walk(rectified, cps(0.8), steps, 5_000)[0.0].std()) < 0.9 * WIDTH


# Gaussian steps


def test_logp_is_the_mean_log_density():
    step = Step(normal(3, 2, 4), torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).reshape(3, 1, 1))
    x = normal(3, 2, 4, seed=1)
    ref = torch.distributions.Normal(step.mean, step.std.expand_as(x)).log_prob(x).mean((1, 2))
    assert torch.allclose(step.logp(x), ref)
    assert torch.allclose(step.logp(x, drop=True), -((x - step.mean) ** 2).mean((1, 2)))


def test_the_ratio_is_one_on_what_was_drawn():
    args = two(rectified)
    step = sde(0.7)(*args)
    x = step.draw(normal(3, 4, seed=5))
    assert torch.equal(step.logp(x), sde(0.7)(*args).logp(x))


def test_policy_gradients_flow_through_the_mean_only():
    mean = normal(2, 3).requires_grad_()
    step = Step(mean, torch.full((2, 1), 0.5, dtype=torch.float64))
    noise = normal(2, 3, seed=1)
    step.logp(step.draw(noise)).sum().backward()  # x' depends on the mean; held constant
    assert mean.grad is not None and torch.allclose(mean.grad, noise / 0.5 / 3)


def test_kl_in_both_forms():
    path, x, v, t, s = two(rectified)
    live, ref = sde(0.7)(path, x, v, t, s), sde(0.7)(path, x, v + 0.1, t, s)
    ours = torch.distributions.kl_divergence(
        torch.distributions.Normal(live.mean, live.std.expand_as(x)),
        torch.distributions.Normal(ref.mean, ref.std.expand_as(x)),
    ).mean(1)
    assert torch.allclose(live.kl(ref), ours)
    g = 0.7 * math.sqrt(0.8 / 0.2)
    coded = ((live.mean - ref.mean) ** 2 / (2 * g**2)).mean(1)  # Flow-GRPO's code: std_dev_t without sqrt(-dt)
    assert torch.allclose(live.kl(ref, dt=t - s), coded, rtol=1e-5)
    closed = 0.2 / 2 * (g * (1 - 0.8) / (2 * 0.8) + 1 / g) ** 2 * 0.01  # the paper, after Eq. 9
    assert torch.allclose(ours, torch.tensor(closed, dtype=torch.float64).expand(3), rtol=1e-5)


def test_a_deterministic_step_has_no_density():
    step = ode(*two(rectified))
    assert torch.equal(step.draw(normal(3, 4)), step.mean)
    assert step.logp(step.mean, drop=True).eq(0).all()
    for wrong in (lambda: step.logp(step.mean), lambda: step.kl(step)):
        with pytest.raises(ValueError, match="no density"):
            wrong()


@pytest.mark.parametrize("kernel", [ode, *NOISY], ids=repr)
def test_gradients_through_a_step_match_finite_differences(kernel: Kernel):
    path, x, v, t, s = two(cosine)
    torch.autograd.gradcheck(lambda x, v: kernel(path, x, v, t, s).mean, (x.requires_grad_(), v.requires_grad_()))


# diffusers


@pytest.mark.parametrize("by", [1.18, 1.43, 1.67, 2.07, 2.57, 3.0])
def test_a_shift_that_rounds_the_first_time_below_one_still_begins_in_noise(by: float):
    """float32 makes 0.9999999 of some shifts: the first stochastic step must be the one from 1."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=by)
    scheduler.set_timesteps(10)
    first, second = scheduler.sigmas[0].expand(2), scheduler.sigmas[1].expand(2)
    x, v = normal(2, 4, dtype=torch.float32), normal(2, 4, seed=1, dtype=torch.float32)
    step, exact = (sde(0.7)(rectified, x, v, t, second) for t in (first, torch.ones(2)))
    assert torch.allclose(step.mean, exact.mean, atol=1e-4) and torch.allclose(step.std, exact.std, atol=1e-4)


@pytest.mark.parametrize("steps,by", [(1, 3.0), (10, 3.0), (14, 3.0), (28, 1.0), (40, 3.0), (7, 1.5)])
def test_shifted_grid_is_flow_match_euler(steps: int, by: float):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=by)
    scheduler.set_timesteps(steps)
    grid = shifted_grid(steps, by)
    assert grid.shape == (steps + 1,) and grid[0] == 1 and grid[-1] == 0
    assert torch.allclose(grid, scheduler.sigmas, atol=2e-7)
    x, v = normal(2, 4, dtype=torch.float32), normal(2, 4, seed=1, dtype=torch.float32)
    for k, time in enumerate(scheduler.timesteps):
        ours = ode(rectified, x, v, grid[k].expand(2), grid[k + 1].expand(2)).mean
        assert torch.allclose(ours, scheduler.step(v, time, x, return_dict=False)[0], atol=1e-6)


def test_dynamic_grid_is_fluxs():
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist(), mu=0.9)
    assert torch.allclose(dynamic_grid(8, 0.9), scheduler.sigmas, atol=2e-7)


@pytest.mark.parametrize("spacing,offset,to_one", [("leading", 1, False), ("leading", 0, True), ("trailing", 0, True)])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_ddim(spacing: Any, offset: int, to_one: bool, eta: float, prediction: Any):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=offset,
        set_alpha_to_one=to_one, timestep_spacing=spacing, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    path, grid = ddpm(scheduler.alphas_cumprod), ddim_grid(20, spacing=spacing, offset=offset, alpha_to_one=to_one)
    assert torch.equal(timestep(grid[:-1]), scheduler.timesteps.float())
    x, out = normal(2, 4, dtype=torch.float32), normal(2, 4, seed=1, dtype=torch.float32)
    noise = normal(2, 4, seed=2, dtype=torch.float32)
    for k, time in enumerate(scheduler.timesteps.tolist()):
        t, s = grid[k].expand(2), grid[k + 1].expand(2)
        ours = ddim(eta)(path, x, to_velocity(path, x, t, out, prediction), t, s).draw(noise)
        given = {"variance_noise": noise} if eta else {}
        theirs = scheduler.step(out, time, x, eta=eta, return_dict=False, **given)[0]
        assert torch.allclose(ours, theirs, atol=3e-4, rtol=1e-4), k


def test_ddim_is_the_ode_of_the_table():
    """Halving the steps of DDIM converges to one solution: the kernel integrates the probability-flow ODE."""

    def end(steps: int) -> Tensor:
        x, grid = torch.full((1, 1), 0.7, dtype=torch.float64), linear_grid(steps).double()
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            x = ddim(0.0)(SD15, x, exact(SD15, x, t), t, s).mean
        return x

    a, s = (float(c) for c in SD15(torch.ones(1))[:2])
    truth = CENTRE + WIDTH * (0.7 - a * CENTRE) / math.sqrt(a**2 * WIDTH**2 + s**2)
    errors = [abs(float(end(n)) - truth) for n in (25, 100, 400)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 2e-2


def outputs(x: Tensor, t: Tensor) -> Tensor:
    """What a network might say: smooth in x and t, and far from any exact answer."""
    return 0.4 * x.roll(1, -1) - 0.3 * x + 0.5 * torch.sin(3 * t).to(x) * x.cos()


def solved(path: Path, grid: Tensor, x: Tensor, say: Any) -> list[Tensor]:
    """Every point of a walk of dpm2, as `rig.walk` makes it."""
    points, before = [x], None
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        t, s, x = t.expand(2), s.expand(2), points[-1]
        v = say(x, t)
        second = before is not None and float(s[0]) > 0
        points.append((dpm2.second(path, x, v, t, s, before) if second else dpm2(path, x, v, t, s)).mean)  # type: ignore[arg-type]
        before = split(path, x, v, t)[0], t
    return points


@pytest.mark.parametrize("steps,by", [(1, 3.0), (2, 3.0), (3, 1.0), (10, 3.0), (20, 5.0)])
def test_dpm2_is_diffusers_multistep_solver_on_flows(steps: int, by: float):
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=by, solver_order=2,
        algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    grid, theirs = scheduler.sigmas, normal(2, 4, dtype=torch.float32)
    ours = solved(rectified, grid, theirs, lambda x, t: outputs(x, t[0]))
    for k, time in enumerate(scheduler.timesteps):
        theirs = scheduler.step(outputs(theirs, grid[k]), time, theirs, return_dict=False)[0]
        assert torch.allclose(ours[k + 1], theirs, atol=1e-5), k


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dpm2_is_diffusers_multistep_solver_on_tables(prediction: Any):
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1,
        timestep_spacing="leading", solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    path = ddpm(scheduler.alphas_cumprod)
    grid = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    theirs = normal(2, 4, dtype=torch.float32)
    ours = solved(path, grid, theirs, lambda x, t: to_velocity(path, x, t, outputs(x, t[0]), prediction))
    for k, time in enumerate(scheduler.timesteps):
        theirs = scheduler.step(outputs(theirs, grid[k]), time, theirs, return_dict=False)[0]
        assert torch.allclose(ours[k + 1], theirs, atol=5e-4, rtol=1e-4), k


@every_path
def test_dpm2_is_of_order_two(path: Path):
    """From a first step of order 1, halving the steps quarters the error; Euler's is halved."""

    def end(second: bool, steps: int) -> float:
        grid = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)
        x = torch.full((2, 1), 0.7, dtype=torch.float64)
        if second:
            return float(solved(path, grid, x, lambda x, t: exact(path, x, t[0]))[-1][0, 0])
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            x = ode(path, x, exact(path, x, t), t, s).mean
        return float(x[0, 0])

    (a, b, *_), (a1, b1, *_) = (path(torch.tensor(t, dtype=torch.float64)) for t in (0.9, 0.2))
    width = [math.sqrt(float(alpha) ** 2 * WIDTH**2 + float(sigma) ** 2) for alpha, sigma in ((a, b), (a1, b1))]
    truth = float(a1) * CENTRE + (0.7 - float(a) * CENTRE) * width[1] / width[0]  # the ODE keeps a Gaussian's quantiles
    two, four = (abs(end(True, n) - truth) for n in (100, 200))
    assert 3 < two / four < 5 and two < 0.3 * abs(end(False, 100) - truth)


def test_dpm2_forgets_what_was_pure_noise():
    """At t = 1 nothing is known of x0 in units of noise: the step after it is of the first order, and finite."""
    x, v = normal(2, 4), normal(2, 4, seed=1)
    t, s, one = (torch.full((2,), value, dtype=torch.float64) for value in (0.9, 0.8, 1.0))
    step = dpm2.second(rectified, x, v, t, s, (normal(2, 4, seed=2), one))
    assert torch.allclose(step.mean, ode(rectified, x, v, t, s).mean, atol=1e-12)


# Grids


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.floats(0.2, 8))
def test_every_grid_falls_from_one_to_zero(steps: int, by: float):
    for grid in (linear_grid(steps), shifted_grid(steps, by), dynamic_grid(steps, math.log(by))):
        assert grid.shape == (steps + 1,) and grid[0] == 1 and grid[-1] == 0
        assert (grid.diff() < 0).all()


def test_bad_grids_are_refused():
    for wrong in (
        lambda: linear_grid(0),
        lambda: shifted_grid(0),
        lambda: ddim_grid(0),
        lambda: ddim_grid(1001),
        lambda: ddim_grid(1000, offset=1),
        lambda: ddim_grid(10, spacing="linspace"),  # type: ignore
    ):
        with pytest.raises(ValueError):
            wrong()
    assert torch.equal(ddim_grid(50, spacing="trailing"), linear_grid(50))
