"""Weight copies of one network: policy, ref, old and ema are switched and leave no trace in each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model

# Of a velocity of size 2: 1e-6 for each product on its way. Equal weights give equal bits only where torch takes the same kernel, and
# it folds a batch into one matrix or not depending on whether a parameter requires a gradient, though none is recorded.
ROUNDING = 1e-5


def draw(model: Any, weights: str, merged: bool = False) -> torch.Tensor:
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(1))
    t, cond = torch.tensor([0.9, 0.5, 0.1]), model.encode(["a", "b", "c"])
    with torch.no_grad():
        return model.velocity(x, t, cond, weights=weights, merged=merged)


def push(model: Any, weights: float = 0.02) -> None:
    """As an optimiser would: change the live weights."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(weights * torch.randn(p.shape, generator=generator))


@pytest.fixture
def model(tiny_pipe: Path) -> Any:
    return open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)


def test_ref_is_the_model_without_adapter_to_the_last_bit(tiny_pipe: Path, model: Any) -> None:
    plain = open_model(find_model_spec(str(tiny_pipe)), device="cpu")
    base = draw(plain, "policy")
    assert torch.equal(draw(model, "ref"), base)
    assert torch.equal(draw(model, "policy"), base)  # the second factor starts at zero
    model.update_copy("old", 0.0)
    push(model)
    assert torch.equal(draw(model, "ref"), base)
    assert not torch.allclose(draw(model, "policy"), base, atol=1e-4)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, t = torch.randn(2, *model.shape), torch.tensor([0.3, 0.6])
    model.velocity(x, t, model.encode(["a", "b"])).square().mean().backward()
    adam.step()
    assert torch.equal(draw(model, "ref"), base)


def test_the_random_start_is_the_seeds(tiny_pipe: Path) -> None:
    first, same, other = (
        open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=seed).parameters()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_copies_blend_and_stay_behind(model: Any) -> None:
    push(model)
    model.update_copy("ema", 0.9)  # the first call makes it equal
    start = {k.removeprefix("ema/"): v for k, v in model.lora.state().items() if k.startswith("ema/")}
    assert all(torch.equal(value, model.lora.state()[f"policy/{key}"]) for key, value in start.items())
    assert torch.allclose(draw(model, "ema"), draw(model, "policy"), atol=ROUNDING)
    push(model, 0.1)
    assert not torch.allclose(draw(model, "ema"), draw(model, "policy"), atol=1e-5)
    model.update_copy("ema", 0.9)
    state = model.lora.state()
    for key, was in start.items():
        assert torch.allclose(state[f"ema/{key}"], 0.9 * was + 0.1 * state[f"policy/{key}"], atol=1e-7)
    model.update_copy("old", 0.5)
    model.update_copy("old", 0.0)
    state = model.lora.state()
    assert all(torch.equal(state[f"old/{key}"], state[f"policy/{key}"]) for key in start)
    assert torch.allclose(draw(model, "old"), draw(model, "policy"), atol=ROUNDING)


def test_switching_leaves_no_trace(model: Any) -> None:
    model.update_copy("old", 0.0)
    push(model)
    named = dict(model.network.named_parameters())
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in named.items()}
    assert sum(r for r, _ in before.values()) == len(model.parameters())
    live = draw(model, "policy")
    for weights in ("ref", "old", "policy", "old", "ref"):
        draw(model, weights)
    model.update_copy("ema", 0.5)
    assert torch.equal(draw(model, "policy"), live)
    for name, (grad, value) in before.items():
        assert named[name].requires_grad == grad and torch.equal(named[name], value)
    assert sum(p.requires_grad for p in model.network.parameters()) == len(model.parameters())


def test_a_switch_between_forward_and_backward_cuts_no_graph(model: Any) -> None:
    push(model)
    x, t, cond = torch.randn(2, *model.shape), torch.tensor([0.3, 0.6]), model.encode(["a", "b"])

    def gradient(look_away: bool) -> list[torch.Tensor]:
        live = model.velocity(x, t, cond)
        if look_away:
            draw(model, "ref")
            model.update_copy("old", 0.0)
            draw(model, "old")
        return list(torch.autograd.grad(live.square().mean(), model.parameters()))

    for a, b in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(a, b)


# Merging


def test_a_merged_copy_computes_the_same_function_with_fewer_operations(model: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model.update_copy("old", 0.0)
    push(model)
    for weights in ("policy", "old", "ref"):
        separate, merged = draw(model, weights), draw(model, weights, merged=True)
        assert torch.allclose(separate, merged, atol=ROUNDING) and model.current_weights == weights
        flops: list[int] = []
        for how in (False, True):
            draw(model, weights, merged=how)  # merging itself is not counted
            with FlopCounterMode(display=False) as counter:
                draw(model, weights, merged=how)
            flops.append(counter.get_total_flops())
        assert flops[1] < flops[0] if weights != "ref" else flops[1] == flops[0]
    assert not torch.allclose(draw(model, "policy", merged=True), draw(model, "old", merged=True), atol=1e-4)


def test_a_merge_leaves_no_trace(model: Any) -> None:
    """Every weight is the same object with the same bits again, also after the policy moved or a copy was made meanwhile."""
    push(model)
    named = {name: (p, p.detach().clone()) for name, p in model.network.named_parameters()}
    separate, base = draw(model, "policy"), draw(model, "ref")
    draw(model, "policy", merged=True)
    assert torch.equal(draw(model, "policy"), separate)
    draw(model, "policy", merged=True)
    assert torch.equal(draw(model, "ref", merged=True), base) and torch.equal(draw(model, "ref"), base)
    draw(model, "policy", merged=True)
    model.update_copy("old", 0.0)
    draw(model, "old", merged=True)
    model.update_copy("old", 0.5)
    model.restore_weights(model.weight_state())
    assert torch.equal(draw(model, "policy"), separate)
    for name, parameter in model.network.named_parameters():
        if name in named:
            assert parameter is named[name][0] and torch.equal(parameter, named[name][1])


def test_an_update_is_in_the_next_merge(model: Any) -> None:
    push(model)
    x, t, cond = torch.randn(2, *model.shape), torch.tensor([0.3, 0.6]), model.encode(["a", "b"])
    draw(model, "policy", merged=True)
    model.velocity(x, t, cond).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.allclose(draw(model, "policy", merged=True), draw(model, "policy"), atol=ROUNDING)
    model.update_copy("old", 0.0)
    draw(model, "old", merged=True)
    push(model)
    model.update_copy("old", 0.0)
    assert torch.allclose(draw(model, "old", merged=True), draw(model, "policy"), atol=ROUNDING)


def test_a_pass_with_a_gradient_is_never_merged(model: Any) -> None:
    x, t, cond = torch.randn(2, *model.shape), torch.tensor([0.3, 0.6]), model.encode(["a", "b"])
    push(model)
    plain = torch.autograd.grad(model.velocity(x, t, cond).square().mean(), model.parameters())
    asked = torch.autograd.grad(model.velocity(x, t, cond, merged=True).square().mean(), model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, asked, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_merge_between_forward_and_backward_changes_no_gradient(tiny_pipe: Path, checkpointing: bool) -> None:
    model_spec = replace(find_model_spec(str(tiny_pipe)), checkpointing=checkpointing)
    model = open_model(model_spec, device="cpu", adapter=Adapter(rank=4), seed=0)
    push(model)
    x, t, cond = torch.randn(2, *model.shape), torch.tensor([0.3, 0.6]), model.encode(["a", "b"])

    def gradient(sampled_meanwhile: bool) -> list[torch.Tensor]:
        live = model.velocity(x, t, cond)
        if sampled_meanwhile:
            draw(model, "policy", merged=True)
        return list(torch.autograd.grad(live.square().mean(), model.parameters()))

    for a, b in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_merged_into_half_precision_or_where_a_setting_says_so(tiny_pipe: Path) -> None:
    """A young LoRA moves a weight by less than half a step of bfloat16: rounded to its grid, it would be as if not trained."""
    model_spec = find_model_spec(str(tiny_pipe))
    for spec, precision in ((model_spec, "bf16"), (replace(model_spec, merge=False), "fp32")):
        model = open_model(spec, device="cpu", precision=precision, adapter=Adapter(rank=4), seed=0)
        push(model)
        assert not model.merges
        draw(model, "policy", merged=True)
        assert not model.lora.merged


def test_a_copy_takes_nothing_from_the_random_numbers(model: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.update_copy("old", 0.0)
    assert torch.equal(torch.rand(3), expected)


def test_a_name_that_was_never_blended_is_unknown(model: Any) -> None:
    with pytest.raises(KeyError, match="no weights named 'emma'"):
        model.lora.switch("emma")


def test_state_goes_over_to_a_fresh_module(tiny_pipe: Path, model: Any) -> None:
    push(model)
    model.update_copy("ema", 0.9)
    push(model)
    fresh = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=9)
    fresh.lora.restore(model.lora.state())
    for weights in ("policy", "ema", "ref"):
        assert torch.equal(draw(fresh, weights), draw(model, weights))
    assert fresh.lora.copies == ["ema"]
    assert sum(p.requires_grad for p in fresh.network.parameters()) == len(fresh.parameters())
