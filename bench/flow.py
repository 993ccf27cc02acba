"""Affine paths between data and noise, Gaussian sampling steps along them, and time grids.

A path is x_t = alpha(t) x0 + sigma(t) eps with t in [0, 1]; t = 0 is data, t = 1 is noise. Every model family is a
velocity field v = alpha'(t) x0 + sigma'(t) eps on such a path: `rectified` for SD3 and FLUX, `ddpm(table)` for SD1.5 and
SDXL, `cosine` as the closed form of the latter. `to_velocity` turns a network's output into v, so one algebra serves all.

Every kernel lands at  alpha(s) x0_hat + q eps_hat  and adds Gaussian noise of width std; kernels differ in (q, std) only:

    ode    q = sigma(s)                            std = 0
    sde    q = sigma(s) - g^2 (t - s) / (2 sigma)  std = g sqrt(t - s),  g^2 = noise_level^2 sigma / alpha   Flow-GRPO
    dance  the same                                with g = eta                                              DanceGRPO
    cps    q = sqrt(sigma(s)^2 - std^2)            std = sigma(s) sin(eta pi / 2)                            Flow-CPS
    ddim   the same                                std = eta * the ancestral width                           DDPO

`dpm2` is the ODE too, with a memory of one step.

Coefficients are computed in float64 on (B,) times, tensors in float32 or better: half precision is raised first.
Pure functions of tensors. Shapes: x, v, x0, eps (B, ...); t, s (B,) or (); t = time left of a step, s = time right of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

Coefs = tuple[Tensor, Tensor, Tensor, Tensor]  # alpha, sigma, alpha', sigma'
# Bound on alpha at the noisiest time: it is 0, but schedulers shift in float32 and may leave 1e-7; a second time is never so near.
FIRST = 1e-6
Prediction = Literal["velocity", "epsilon", "v_prediction", "sample"]  # the words of diffusers' `prediction_type`


class Path(Protocol):
    """A path between data and noise: times (B,) -> (alpha, sigma, alpha', sigma'), each (B,)."""

    def __call__(self, t: Tensor, /) -> Coefs: ...


# Precision and shape


def wide(x: Tensor) -> Tensor:
    """x in float32 or better: half precision is raised, float32 and float64 pass."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def precise(t: Tensor) -> Tensor:
    """t in float64 (float32 on Apple's GPU, which has no float64)."""
    return t.to(_best(t.device))


def _best(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def like(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in x's dtype (float32 or better), so that it multiplies x: (B, ...)."""
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return t.to(dtype).reshape(-1, *[1] * (x.ndim - 1))


# Paths


@dataclass(frozen=True)
class Rectified:
    """The straight path of SD3 and FLUX: x_t = (1 - t) x0 + t eps, v = eps - x0 (arXiv 2209.03003).

    The shift moves no point of the path: it says where the model's schedule puts its times, see `shift` and `training_times`.
    """

    shift: float = 1.0  # of the model's schedule: 3 for SD3.5, 1 for none

    def __call__(self, t: Tensor) -> Coefs:
        derivative = torch.ones_like(t)
        return 1 - t, t, -derivative, derivative


rectified = Rectified()  # without a shift


def cosine(t: Tensor) -> Coefs:
    """The variance-preserving path with angle pi t / 2: alpha = cos, sigma = sin (arXiv 2102.09672 without its offset)."""
    a = t * (math.pi / 2)
    return a.cos(), a.sin(), -a.sin() * (math.pi / 2), a.cos() * (math.pi / 2)


@lru_cache(maxsize=16)
def _angles(table: tuple[float, ...], device: torch.device) -> Tensor:
    """(N + 1,): arccos sqrt(abar) at t = 0, 1/N, ..., 1, with abar = 1 put before the table."""
    abar = torch.tensor((1.0, *table), dtype=torch.float64)
    return torch.atan2((1 - abar).sqrt(), abar.sqrt()).to(device, _best(device))


@dataclass(frozen=True)
class Ddpm:
    """A variance-preserving table made continuous; see `ddpm`."""

    table: tuple[float, ...] = field(repr=False)  # alphas_cumprod, N numbers

    def __call__(self, t: Tensor) -> Coefs:
        n = len(self.table)
        angles = _angles(self.table, t.device)
        u = precise(t) * n
        k = u.detach().floor().clamp(0, n - 1).long()
        slope = (angles[k + 1] - angles[k]) * n
        a = angles[k] + (angles[k + 1] - angles[k]) * (u - k)
        return a.cos(), a.sin(), -a.sin() * slope, a.cos() * slope


def ddpm(alphas_cumprod: Sequence[float] | Tensor) -> Ddpm:
    """The path of a DDPM table (SD1.5, SDXL): alpha = sqrt(abar), sigma = sqrt(1 - abar).

    Time: t = (k + 1) / N for the table's integer timestep k, so t = 1 is the last entry and t = 0 is clean data
    (abar = 1); `timestep` goes back. Between entries the angle arctan(sigma / alpha) is linear in t: alpha' and sigma'
    are its exact derivatives, finite at both ends (linear abar or log-SNR would not be), and the velocity is the slope of
    the angle times diffusers' v-prediction. Raises ValueError when the table does not decrease within [0, 1].
    """
    table = tuple(torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten().tolist())
    if not table or any(b >= a for a, b in zip((1.0, *table), table, strict=False)) or table[-1] < 0:
        raise ValueError("alphas_cumprod must decrease strictly from below 1 and stay at or above 0")
    return Ddpm(table)


def timestep(t: Tensor, train: int = 1000) -> Tensor:
    """The table's timestep k = t N - 1 of a time on a `ddpm` path; a float, rounded to the integer when within 1e-3."""
    k = precise(t) * train - 1
    return torch.where((k - k.round()).abs() < 1e-3, k.round(), k).to(torch.float32)


# Points and velocities


def mix(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point on the path at t and its velocity: alpha x0 + sigma eps and alpha' x0 + sigma' eps, both (B, ...)."""
    a, s, da, ds = (like(c, x0) for c in path(precise(t)))
    x0, eps = wide(x0), wide(eps)
    return a * x0 + s * eps, da * x0 + ds * eps


def split(path: Path, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The (x0, eps) that a point and its velocity imply, both (B, ...): the inverse of mix."""
    a, s, da, ds = path(precise(t))
    det = a * ds - da * s
    x, v, a, s, da, ds = wide(x), wide(v), *(like(c / det, x) for c in (a, s, da, ds))
    return ds * x - s * v, a * v - da * x


def to_velocity(path: Path, x: Tensor, t: Tensor, out: Tensor, prediction: Prediction = "velocity") -> Tensor:
    """A network's output at (x, t) as a velocity (B, ...); with d = alpha sigma' - alpha' sigma and n = alpha^2 + sigma^2:

        velocity      v = out
        epsilon       v = (alpha' x + d out) / alpha       out = eps_hat; nothing is known where alpha = 0
        sample        v = (sigma' x - d out) / sigma       out = x0_hat;  nothing is known where sigma = 0
        v_prediction  v = ((alpha alpha' + sigma sigma') x + d out) / n     out = alpha eps - sigma x0 (arXiv 2202.00512)

    Divisors are held at 1e-6 or more, so the ends stay finite.

    Args:
        path: between data and noise.
        x: latents (B, ...).
        t: times (B,).
        out: the network's output (B, ...).
        prediction: what the network predicts.

    Raises:
        ValueError: on an unknown prediction.
    """
    if prediction == "velocity":
        return wide(out)
    a, s, da, ds = path(precise(t))
    d = a * ds - da * s
    if prediction == "epsilon":
        cx, co = da / a.clamp(min=1e-6), d / a.clamp(min=1e-6)
    elif prediction == "sample":
        cx, co = ds / s.clamp(min=1e-6), -d / s.clamp(min=1e-6)
    elif prediction == "v_prediction":
        cx, co = (a * da + s * ds) / (a**2 + s**2), d / (a**2 + s**2)
    else:
        raise ValueError(f"unknown prediction {prediction!r}: velocity, epsilon, v_prediction or sample")
    return like(cx, x) * wide(x) + like(co, x) * wide(out)


def error_scale(path: Path, t: Tensor, prediction: Prediction) -> Tensor:
    """(B,), float64: factor from a squared velocity error at t to the squared error of another prediction at the same x.

    epsilon (alpha / d)^2, sample (sigma / d)^2, v_prediction (n / d)^2; e.g. Diffusion-DPO's loss on an epsilon model is
    the epsilon error. On the rectified path they are (1 - t)^2, t^2 and (1 - 2t + 2t^2)^2.
    """
    a, s, da, ds = path(precise(t))
    d = a * ds - da * s
    over = {"velocity": d, "epsilon": a, "sample": s, "v_prediction": a**2 + s**2}
    if prediction not in over:
        raise ValueError(f"unknown prediction {prediction!r}: {', '.join(over)}")
    return (over[prediction] / d) ** 2


# Steps


@dataclass(frozen=True)
class Step:
    """One Gaussian transition x_t -> x_s. std = 0 is deterministic.

    std is not read here, because every step would wait for the device: the density of a step whose std turns out to be 0 is NaN.
    """

    mean: Tensor  # (B, ...)
    std: Tensor  # (B, 1, ..., 1)
    deterministic: bool = False  # std is 0 by the kernel's definition

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std * noise, (B, ...); noise is standard normal and the caller's own (float32 or better, unrounded)."""
        return self.mean + self.std * noise

    def repeat(self, n: int) -> Step:
        """The step of each state n times in a row, (B n, ...): one velocity serves the n children of a state."""
        return Step(self.mean.repeat_interleave(n, 0), self.std.repeat_interleave(n, 0))

    def logp(self, x: Tensor, drop: bool = False) -> Tensor:
        """(B,): log density of x, a MEAN over elements (the field's convention; the joint density is D times it).

        x is a constant: gradients flow through the mean only (Flow-GRPO, DDPO). drop = True leaves out the constants AND
        the factor 1 / (2 std^2): -mean (x - mean)^2, Flow-CPS's form, which is no density (arXiv 2509.05952, its code).
        Raises ValueError for a deterministic step unless drop is True: it has no density.
        """
        square = (wide(x.detach()) - self.mean) ** 2
        if drop:
            return -square.flatten(1).mean(1)
        self._require_density()
        return (-square / (2 * self.std**2) - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    def kl(self, other: Step, dt: Tensor | float | None = None) -> Tensor:
        """(B,): KL(self || other) of two steps with one std, mean (mean - mean')^2 / (2 std^2), a MEAN over elements.

        That is the Gaussian KL, of the paper Flow-GRPO: with std^2 = g^2 (t - s) it divides by dt. Given dt = t - s > 0,
        (B,) or a number, it is multiplied by it: mean (mean - mean')^2 / (2 g^2), the form of Flow-GRPO's code. Beta
        0.004 on the first acts like 0.04 on the second at ten steps (yifan123/flow_grpo#22). other's mean is a constant.
        """
        self._require_density()
        kl = ((self.mean - other.mean.detach()) ** 2 / (2 * self.std**2)).flatten(1).mean(1)
        return kl if dt is None else kl * torch.as_tensor(dt, dtype=kl.dtype, device=kl.device)

    def _require_density(self) -> None:
        if self.deterministic:
            raise ValueError("a deterministic step (std = 0) has no density")


Kernel = Callable[[Path, Tensor, Tensor, Tensor, Tensor], Step]  # (path, x, v, t, s); hashable, its repr is its record


def land(path: Path, x: Tensor, v: Tensor, t: Tensor, p: Tensor, q: Tensor, std: Tensor) -> Step:
    """The step whose mean is p x0_hat + q eps_hat; p, q, std (B,).

    Written as one coefficient on x and one on v, both in float64, so that Euler is x + (s - t) v to the last bit.

    Args:
        path: between data and noise.
        x: latents (B, ...) at t.
        v: their velocity (B, ...).
        t: times (B,).
        p: coefficients (B,) of x0_hat.
        q: coefficients (B,) of eps_hat.
        std: standard deviations (B,) of the noise that the step adds.
    """
    a, sig, da, ds = path(precise(t))
    det = a * ds - da * sig
    cx, cv = (p * ds - q * da) / det, (q * a - p * sig) / det
    return Step(like(cx, x) * wide(x) + like(cv, x) * wide(v), like(std, x))


def _coefficients(path: Path, t: Tensor, s: Tensor) -> tuple[Coefs, Tensor, Tensor, Tensor]:
    """The coefficients at t, then alpha(s), sigma(s) and the step's length t - s > 0; all float64."""
    t, s = precise(t), precise(s)
    return path(t), *path(s)[:2], t - s


@dataclass(frozen=True)
class Ode:
    """x_s = alpha(s) x0_hat + sigma(s) eps_hat: DDIM; Euler on the rectified path."""

    def __call__(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Step:
        _, a1, s1, _ = _coefficients(path, t, s)
        return replace(land(path, x, v, t, a1, s1, torch.zeros_like(s1)), deterministic=True)


@dataclass(frozen=True)
class Sde:
    """Flow-GRPO's step (arXiv 2505.05470, Eqs. 7-9 and its code): the marginals of the ODE, noise of scale g.

        g = noise_level sqrt(sigma / (1 - sigma'))      sigma' = sigma(s) where sigma = 1, else sigma
        mean = x + (v + g^2 / (2 sigma) eps_hat) (s - t)          std = g sqrt(t - s)

    The clamp is in that denominator only. On other paths 1 - sigma is alpha / (alpha sigma' - alpha' sigma), so that
    noise_level = sqrt 2 is the diffusion's own noise on each of them, and the drift is the exact ODE's.
    """

    noise_level: float = 0.7

    def __call__(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Step:
        (a, sig, da, ds), a1, s1, dt = _coefficients(path, t, s)
        g2 = self.noise_level**2 * sig * (a * ds - da * sig) / torch.where(a > FIRST, a, a1)
        return land(path, x, v, t, a1, s1 - g2 / (2 * sig) * dt, (g2 * dt).sqrt())


@dataclass(frozen=True)
class Dance:
    """DanceGRPO's step (arXiv 2505.07818, its flux_step): as Flow-GRPO with a constant g = eta.

    mean = x + (v + eta^2 / (2 sigma) eps_hat) (s - t)          std = eta sqrt(t - s)
    """

    eta: float = 0.3

    def __call__(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Step:
        (_, sig, _, _), a1, s1, dt = _coefficients(path, t, s)
        return land(path, x, v, t, a1, s1 - self.eta**2 / (2 * sig) * dt, self.eta * dt.sqrt())


@dataclass(frozen=True)
class Cps:
    """Coefficients-preserving sampling (arXiv 2509.05952): the total noise after the step is sigma(s) for every eta.

    std = sigma(s) sin(eta pi / 2)          mean = alpha(s) x0_hat + sqrt(sigma(s)^2 - std^2) eps_hat

    The coefficients are preserved, the marginals are not: the noise does not shrink with the step, so the walk narrows
    the law even with an exact velocity and many steps (Gaussian data of width 0.5 end at 0.41 with eta = 0.8).
    """

    eta: float = 0.8

    def __call__(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Step:
        _, a1, s1, _ = _coefficients(path, t, s)
        std = s1 * math.sin(self.eta * math.pi / 2)
        return land(path, x, v, t, a1, (s1**2 - std**2).clamp(min=0).sqrt(), std)


@dataclass(frozen=True)
class Ddim:
    """DDIM with noise (arXiv 2010.02502, Eqs. 12 and 16), the policy of DDPO; eta = 1 is ancestral sampling.

    std = eta sigma(s) sqrt(1 - (alpha sigma(s) / (alpha(s) sigma))^2)
    mean = alpha(s) x0_hat + sqrt(sigma(s)^2 - std^2) eps_hat
    """

    eta: float = 1.0

    def __call__(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Step:
        (a, sig, _, _), a1, s1, _ = _coefficients(path, t, s)
        std = self.eta * s1 * (1 - (a * s1 / (a1 * sig)) ** 2).clamp(min=0).sqrt()
        return land(path, x, v, t, a1, (s1**2 - std**2).clamp(min=0).sqrt(), std)


@dataclass(frozen=True)
class Dpm2:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, Algorithm 2): the ODE with the last two estimates of x0.

    With lambda = log(alpha / sigma), h = lambda(s) - lambda(t) and h' = lambda(t) - lambda(t') of the step before:
    x_s = ode + (alpha(s) - sigma(s) alpha / sigma) (h / h') (x0_hat - x0_hat') / 2. A walk begins it, and ends it at
    t = 0, with the first order, which is `ode`.
    """

    def __call__(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Step:
        return ode(path, x, v, t, s)

    def second(self, path: Path, x: Tensor, v: Tensor, t: Tensor, s: Tensor, before: tuple[Tensor, Tensor]) -> Step:
        """The second order; before = (x0_hat (B, ...), time (B,)) of the step before.

        Args:
            path: between data and noise.
            x: latents (B, ...) at t.
            v: their velocity (B, ...).
            t: the step's start (B,).
            s: the step's end (B,).
            before: x0_hat (B, ...) of the step before, and its time (B,).
        """
        x0, past = before
        (a, sig, _, _), a1, s1, _ = _coefficients(path, t, s)
        a2, sig2, _, _ = path(precise(past))
        now, then, past_ = (alpha.log() - sigma.log() for alpha, sigma in ((a, sig), (a1, s1), (a2, sig2)))
        factor = (a1 - s1 * a / sig) * (then - now) / (now - past_) / 2  # past at pure noise: (...) / inf = 0
        first = ode(path, x, v, t, s)
        return replace(first, mean=first.mean + like(factor, x) * (split(path, x, v, t)[0] - x0))


ode, dpm2 = Ode(), Dpm2()
sde, dance, cps, ddim = Sde, Dance, Cps, Ddim


def stochastic(kernel: Kernel) -> bool:
    """Return whether a step of this kernel draws noise."""
    return kernel not in (ode, dpm2)


def step_widths(kernel: Kernel, path: Path, grid: Tensor) -> Tensor:
    """(T,): the standard deviation of a kernel's noise on each step of a grid (T + 1,)."""
    anywhere = torch.zeros(len(grid) - 1, 1, device=grid.device)
    return kernel(path, anywhere, anywhere, grid[:-1], grid[1:]).std[:, 0]


# Time grids: (T + 1,) float32 on the CPU, falling; T steps


def linear_grid(steps: int) -> Tensor:
    """(T + 1,): equal steps from 1 to 0."""
    return torch.linspace(1, 0, _positive(steps) + 1, dtype=torch.float64).float()


def shift(t: Tensor, by: float) -> Tensor:
    """t -> by t / (1 + (by - 1) t): more time at the noisy end for by > 1 (SD3, arXiv 2403.03206, Eq. 23)."""
    return by * t / (1 + (by - 1) * t)


def path_shift(path: Path) -> float:
    """The shift of a path's schedule; 1, none, for a path that has no such thing, as `ddpm` and `cosine`."""
    return float(getattr(path, "shift", 1.0))


def training_times(u: Tensor, path: Path, t_min: float = 0.0, by: float = 0.0) -> Tensor:
    """(B,): times in [t_min, 1] at which a loss trains, from u (B,) in (0, 1): t = shift(l + (1 - l) u), shift(l) = t_min.

    With u logit-normal and t_min = 0 this is the law of the scripts for SD3 (diffusers' train_dreambooth_lora_sd3.py, and
    yifan123/flow_grpo scripts/train_sd3_dpo.py after it): they index the shifted schedule, t = shift(1 - u), and u and
    1 - u have one law. At a shift of 3 its median is 3 / 4; without a shift it is 1 / 2.

    Args:
        u: draws (B,), `rig.normal(n).sigmoid()` for the logit-normal law.
        path: of the model.
        t_min: the lowest time.
        by: the shift; 0 is the path's own, 1 is none.
    """
    by = by or path_shift(path)
    low = t_min / (by + (1 - by) * t_min)
    return shift(low + (1 - low) * u, by)


def shifted_grid(steps: int, by: float = 3.0, train: int = 1000) -> Tensor:
    """(T + 1,): the sigmas of diffusers' FlowMatchEulerDiscreteScheduler(shift=by), 1 to 0.

    The shift is applied twice there: to the last training time 1 / N when the scheduler is built, then to all times; so the
    last time before 0 is shift(shift(1 / N)), 0.0089 for by = 3, whatever the number of steps.
    """
    last = float(shift(torch.tensor(1 / train, dtype=torch.float64), by))
    grid = shift(torch.linspace(1, last, _positive(steps), dtype=torch.float64), by)
    return torch.cat([grid, grid.new_zeros(1)]).float()


def dynamic_grid(steps: int, mu: float) -> Tensor:
    """(T + 1,): FLUX's sigmas, shift(1, ..., 1 / T) by exp(mu), then 0 (diffusers, use_dynamic_shifting)."""
    grid = shift(torch.linspace(1, 1 / _positive(steps), steps, dtype=torch.float64), math.exp(mu))
    return torch.cat([grid, grid.new_zeros(1)]).float()


def ddim_grid(
    steps: int,
    train: int = 1000,
    spacing: Literal["leading", "trailing"] = "leading",
    offset: int = 0,
    alpha_to_one: bool = True,
) -> Tensor:
    """(T + 1,): the timesteps k of diffusers' DDIMScheduler as times (k + 1) / N of a `ddpm` path.

    offset is its steps_offset (leading only); the last time is 0, or 1 / N when set_alpha_to_one is False (SD1.5 and SDXL: offset 1,
    alpha_to_one False).

    Args:
        steps: the number T of steps.
        train: the number N of training timesteps.
        spacing: the scheduler's timestep_spacing.
        offset: the scheduler's steps_offset, for "leading" only.
        alpha_to_one: the scheduler's set_alpha_to_one.

    Raises:
        ValueError: when a timestep would leave the table.
    """
    if not 1 <= steps <= train:
        raise ValueError(f"steps must lie in 1..{train}, not {steps}")
    if spacing == "leading":
        k = [i * (train // steps) + offset for i in reversed(range(steps))]
    elif spacing == "trailing":
        k = [round(train - i * train / steps) - 1 for i in range(steps)]
    else:
        raise ValueError(f"unknown spacing {spacing!r}: leading or trailing")
    if k[0] >= train:
        raise ValueError(f"timestep {k[0]} is outside a table of {train}: lower offset or steps")
    times = [(i + 1) / train for i in k] + [0.0 if alpha_to_one else 1 / train]
    return torch.tensor(times, dtype=torch.float64).float()


def _positive(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, not {steps}")
    return steps
