"""Scores with a gradient equal the scores of the same pixels, and a scorer without one is named in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gpobench.bench.assets import glyphs
from gpobench.bench.errors import UserError
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.experiments.run import run
from gpobench.bench.rendering import differentiable_pixels, to_uint8
from gpobench.bench.scoring.differentiable import ask_with_gradient, scorers_with_gradient, without_gradient
from gpobench.bench.scoring.scorers import ask, open_scorer
from gpobench.bench.spec import DifferentiableScorer, Prompt
from gpobench.rewards.two_towers import Crop, Letterbox, Stretch

TINY = ["pickscore:tiny", "hpsv2:tiny", "pickscore:tiny*0.5+hpsv2:tiny*-0.25"]
PROMPTS = [Prompt(glyphs.word_prompt(word)) for word in ("BOX", "CAT", "RAIN")]


def images() -> torch.Tensor:
    """Three signs (3, 3, 32, 64) as a decoder makes them: near [0, 1], here and there outside."""
    drawn = torch.from_numpy(np.stack([glyphs.draw_word(word) for word in ("BOX", "DOG", "RAIN")])).movedim(-1, 1) / 255
    return drawn + 0.05 * torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reference", TINY)
def test_the_value_is_the_array_score_of_the_same_pixels(reference: str) -> None:
    """To 1e-5 of its size: the same float32 network on the same numbers."""
    scorer, decoded = open_scorer(reference), images().requires_grad_()
    got = ask_with_gradient(scorer, decoded, PROMPTS)
    expected = ask(scorer, to_uint8(decoded.detach()), PROMPTS).value[scorer.metrics[0]]
    assert got.reasons == {} and np.allclose(got.value.detach().numpy(), expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(got.value.sum(), decoded)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 0 and bool(gradient.isfinite().all())


@pytest.mark.parametrize("reference", TINY[:2])
def test_the_gradient_is_the_slope(reference: str) -> None:
    """Central differences of the array score's own function along a direction, in float32 with room for its rounding."""
    part: Any = open_scorer(reference)
    x = images().clamp(0.1, 0.9)[:1].requires_grad_()
    (gradient,) = torch.autograd.grad(part.differentiable(x, PROMPTS[:1]).sum(), x)
    along = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        up, down = (float(part.differentiable(x + sign * step * along, PROMPTS[:1])) for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize(
    ("fit", "tolerance"),
    [(Crop(24, "bilinear", "torchvision"), 1e-6), (Crop(24), 1.01 / 255), (Crop(32), 1e-6), (Letterbox(24), 1e-6),
     (Letterbox(64), 1e-6), (Stretch(20, 30), 1e-6)],
)  # fmt: skip
def test_resizing_with_a_gradient_is_the_scorers_resizing(fit: Any, tolerance: float) -> None:
    """PIL computes in fixed point: a 255th at most."""
    pixels = to_uint8(images())[0]
    x = (torch.from_numpy(pixels).movedim(-1, 0) / 255).requires_grad_()
    assert torch.allclose(fit.differentiable(x), fit(pixels), atol=tolerance)
    assert float(torch.autograd.grad(fit.differentiable(x).sum(), x)[0].abs().sum()) > 0


def test_pixels_with_a_gradient_are_those_that_are_written() -> None:
    decoded = images().requires_grad_()
    pixels = differentiable_pixels(decoded)
    assert torch.equal((pixels * 255).round().byte().movedim(1, -1), torch.from_numpy(to_uint8(decoded.detach())))
    (gradient,) = torch.autograd.grad(pixels.sum(), decoded)
    assert torch.equal(gradient, ((decoded >= 0) & (decoded <= 1)).float())


def test_an_image_that_is_not_finite_is_not_scored() -> None:
    decoded = images()
    decoded[1, 0, 3, 4] = torch.nan
    got = ask_with_gradient(open_scorer("pickscore:tiny"), decoded.requires_grad_(), PROMPTS)
    assert got.value.isfinite().tolist() == [True, False, True] and "not finite" in got.reasons[1]


def test_who_has_a_gradient_is_told_without_weights() -> None:
    assert set(scorers_with_gradient()) == {"pickscore", "hpsv2", "clipscore"}
    assert without_gradient(open_scorer(TINY[2])) == []
    assert isinstance(open_scorer(TINY[0]), DifferentiableScorer)
    (line,) = without_gradient(open_scorer("pickscore:tiny+reader"))
    assert line == "reader has none"


def test_a_task_whose_scorer_has_none_is_refused_in_one_line(tmp_path: Any) -> None:
    plan = resolve(RunRequest("draft", "ocr", "tiny", budget="nfe=500", reward="reader"))
    with pytest.raises(UserError) as refusal:
        run(replace(plan), runs=tmp_path)
    line = str(refusal.value)
    assert line.startswith("draft needs the gradient of its reward: reader has none. Scorers with a gradient: ")
    assert "pickscore" in line and "tasks that train on one: " in line and "hpsv2" in line and "\n" not in line
