"""Latents to pixels: finite values are clamped and rounded, and an image that is not finite is never one to score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpobench.bench.rendering import IMAGE_FAULT, LATENT_FAULT, render, to_uint8

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def same(x0: Tensor) -> Tensor:
    return x0


def test_pixels_are_rounded_not_cut() -> None:
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0])
    assert to_uint8(values.expand(1, 3, 1, 5)).tolist() == [[[[v] * 3 for v in (0, 0, 1, 255, 255)]]]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=30))
def test_finite_values_are_clamped_before_they_are_cast(values: list[float]) -> None:
    values = values[: len(values) // 3 * 3]
    pixels = render(same, torch.tensor(values).view(1, 3, 1, -1))
    expected = np.rint(np.clip(np.float32(values), 0, 1) * np.float32(255)).reshape(1, 3, 1, -1).transpose(0, 2, 3, 1)
    assert np.array_equal(pixels.pixels, expected) and pixels.pixels.dtype == np.uint8 and not pixels.faults


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_makes_a_fault_of_its_image_alone(value: float, dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    sound = render(same, images)
    spoilt = images.clone()
    spoilt[2, 1, 4, 3] = value
    rendered = render(lambda x0: spoilt, images)
    assert rendered.faults == {2: IMAGE_FAULT} and rendered.sound_rows == [0, 1, 3] and len(rendered) == 4
    assert np.array_equal(rendered.pixels[[0, 1, 3]], sound.pixels[[0, 1, 3]])
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(spoilt)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_decoder_that_hides_a_latent_that_is_not_finite_hides_nothing(value: float) -> None:
    x0 = torch.zeros(3, 4, 2, 2)
    x0[0, 3, 1, 1] = value
    rendered = render(lambda x0: torch.full((len(x0), 3, 4, 4), 0.5), x0)
    assert rendered.faults == {0: LATENT_FAULT}
