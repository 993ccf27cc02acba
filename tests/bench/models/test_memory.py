"""The memory estimate against real networks: tensors kept for a backward pass, published sizes, peaks measured on a GPU."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.model_spec import Adapter, ModelSpec, find_model_spec
from gpobench.bench.models import architectures, catalogue, memory, sd3
from gpobench.bench.models.memory import GB, blueprint, estimate, hours
from gpobench.bench.models.mini import write_flux, write_sd3, write_sd15, write_sdxl
from gpobench.bench.models.open import open_model

WRITE: dict[str, Any] = {"sd3": write_sd3, "sd15": write_sd15, "flux": write_flux, "sdxl": write_sdxl}
# what the repositories' own files add up to
SIZES = {
    "sd35m": {"transformer": 2_243_171_520, "text_encoder": 123_650_304, "text_encoder_3": 4_762_310_656},
    "sd35l": {"transformer": 8_056_627_520, "text_encoder_2": 694_659_840},
    "flux1-dev": {"transformer": 11_901_408_320, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
}
NAMED = {model_spec.name: model_spec for model_spec in vars(catalogue).values() if isinstance(model_spec, ModelSpec)}


@pytest.fixture(scope="module", params=list(WRITE))
def model_spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A miniature, 32x32 pixels."""
    found = find_model_spec(str(WRITE[request.param](tmp_path_factory.mktemp("models") / request.param)))
    return replace(found, height=32, width=32, adapter=Adapter(rank=4, targets=found.adapter.targets))


def network_of(model: Any) -> Any:
    return model.pipe.components.get("unet") or model.pipe.components["transformer"]


def test_a_folder_is_counted_exactly(model_spec: ModelSpec) -> None:
    told = estimate(model_spec, precision="fp32")
    model = open_model(model_spec, device="cpu", precision="fp32", adapter=model_spec.adapter)
    assert told.source == "config files" and told.trained == sum(p.numel() for p in model.parameters())
    for name, n in told.parameters.items():
        real = sum(p.numel() for key, p in model.pipe.components[name].named_parameters() if "lora" not in key)
        assert n == real, name


class Live(TorchDispatchMode):
    """The bytes that live tensors made within hold, and the most they ever held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_what_a_forward_keeps_is_what_is_told(model_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every storage that autograd holds after a real forward, in float32: within a tenth."""
    model = open_model(model_spec, device="cpu", precision="fp32", adapter=model_spec.adapter)
    cond = model.encode(["a red circle"])
    tokens = cond["text"].shape[1]
    monkeypatch.setattr(memory, "_latent_size_and_tokens", lambda model_spec, parts: (*model.shape[1:], tokens))
    own = {p.untyped_storage()._cdata for p in network_of(model).parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.velocity(torch.randn(1, *model.shape), torch.tensor([0.5]), cond)
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    told = estimate(model_spec, precision="fp32", checkpointing=False)
    assert out.requires_grad and told.row == pytest.approx(real, rel=0.1)
    assert told.flops == model.flops_a_forward()


def test_checkpointing_keeps_less_and_so_does_half_precision(model_spec: ModelSpec) -> None:
    whole, less, half = (
        estimate(model_spec, precision=p, checkpointing=c).row
        for p, c in (("fp32", False), ("fp32", True), ("bf16", False))
    )
    assert less <= whole and 0.4 * whole < half < whole  # with two blocks there is nothing to save


def test_torch_is_left_as_it_was(model_spec: ModelSpec) -> None:
    before = [functional.linear, functional.layer_norm, functional.scaled_dot_product_attention, functional.conv2d]
    memory._forward.cache_clear()
    estimate(model_spec)
    after = [functional.linear, functional.layer_norm, functional.scaled_dot_product_attention, functional.conv2d]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert torch.get_default_dtype() == torch.float32


def test_the_sums_are_linear(model_spec: ModelSpec) -> None:
    one, many = (estimate(model_spec, micro=n, copies=1) for n in (1, 9))
    assert many.training - one.training == pytest.approx(8 * one.row)
    none, two = (estimate(model_spec, copies=n) for n in (0, 2))
    assert two.states - none.states == 2 * 4 * none.trained == two.training - none.training
    here, away = (estimate(model_spec, offload=off) for off in (False, True))
    assert here.weights - away.weights == pytest.approx(here.encoders) and here.encoders > 0
    assert away.encoding == here.encoding  # off-loaded encoders still come to encode
    whole, slices = (estimate(model_spec, rows=8, sliced=s).sampling for s in (False, True))
    assert whole >= slices
    assert one.peak == max(one.training, one.sampling, one.encoding)
    assert one.fits((one.peak + memory.MARGIN) / GB + 1e-6) and not one.fits(one.peak / GB)
    assert any("an estimate" in line for line in one.lines()) and len(one.lines()) == 4


@pytest.mark.parametrize("name", list(SIZES))
def test_the_published_architectures_have_their_published_sizes(name: str) -> None:
    parts = dict(memory._frozen(architectures.PUBLISHED[name]))
    for part, n in SIZES[name].items():
        assert memory._parameters(parts[part])[0] == n
    assert architectures.PUBLISHED.keys() == SIZES.keys() <= NAMED.keys()


# GB that one H200 had at its peak, with random weights of the true architecture: see docs/models.md
TRAINED = {"diffusion-dpo": (2, 0, 12.7), "dgpo": (4, 1, 17.4), "awm": (6, 1, 22.1), "diffusion-nft": (9, 1, 29.3)}
SAMPLED = {1: 8.0, 8: 12.1, 16: 16.9}


@pytest.mark.slow
def test_the_estimate_is_what_an_h200_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 3.5 Medium at 512 px in bf16, its T5 cut to one layer, CLIP to 16 tokens, everything on the device."""
    parts = dict(architectures.PUBLISHED["sd35m"])
    library, kind, t5 = parts["text_encoder_3"]
    parts["text_encoder_3"] = (library, kind, {**t5, "num_layers": 1, "feed_forward_proj": "relu"})
    monkeypatch.setitem(architectures.PUBLISHED, "sd35m", parts)
    monkeypatch.setattr(sd3, "CLIP_TOKENS", 16)
    setup: dict[str, Any] = {"checkpointing": False, "offload": False, "sliced": False}
    table = 384 * 384 * 1536 * 2 / GB  # the table of places was in float32 there, and not in bf16 as in a loaded model
    for micro, copies, measured in TRAINED.values():
        told = estimate(NAMED["sd35m"], micro=micro, copies=copies, **setup)
        assert told.training / GB + table == pytest.approx(measured, rel=0.02)
    for rows, measured in SAMPLED.items():
        told = estimate(NAMED["sd35m"], rows=rows, copies=0, **setup)
        assert told.sampling / GB + table == pytest.approx(measured, rel=0.04)
    assert told.flops / 1e12 == pytest.approx(2.12, abs=0.005)
    assert (told.weights + 4 * told.trained) / GB + table == pytest.approx(7.3, abs=0.05)


@pytest.mark.slow
def test_sd35m_trains_on_a_card_of_24_gb_and_not_without_saving() -> None:
    model_spec = NAMED["sd35m"]
    assert estimate(model_spec, micro=9).fits(24)
    assert not estimate(model_spec, micro=9, checkpointing=False).fits(24)


def test_hours() -> None:
    # 3600 s at 35 % of 989 TFLOP/s
    assert hours(1.0, 989e12 * 0.35 * 3600, "h200") == pytest.approx(1.0)
    assert hours(10, 1e15, "a100") == pytest.approx(10 * hours(1, 1e15, "a100"))
    assert hours(1, 1e15, "rtx4090") > hours(1, 1e15, "h100")
    with pytest.raises(UserError, match="device 'abacus' is unknown: h200"):
        hours(1, 1, "abacus")


def test_what_cannot_be_told_is_one_line(model_spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision 'fp8' is unknown"):
        estimate(model_spec, precision="fp8")
    with pytest.raises(Missing, match="the sizes of nobody are not known: nobody/nothing is not here"):
        blueprint(ModelSpec(name="nobody", source="nobody/nothing"))
    with pytest.raises(Missing, match="no transformer or U-Net"):
        (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [32]}')
        estimate(ModelSpec(name="x", source=str(tmp_path)))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        blueprint(ModelSpec(name="x", source=str(tmp_path)))


def test_a_checkpointed_backward_pass_peaks_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight blocks, 64x64 pixels, every live tensor watched: above the estimate by no more than what is on its way."""
    found = find_model_spec(str(write_sd3(tmp_path / "deep", layers=8)))
    model_spec = replace(found, height=64, width=64, adapter=Adapter(rank=4, targets=found.adapter.targets))
    peaks: dict[bool, tuple[float, float]] = {}
    for on in (False, True):
        model = open_model(
            replace(model_spec, checkpointing=on), device="cpu", precision="fp32", adapter=model_spec.adapter
        )
        cond = model.encode(["a red circle"])
        tokens = cond["text"].shape[1]
        monkeypatch.setattr(
            memory, "_latent_size_and_tokens", lambda model_spec, parts, m=model, n=tokens: (*m.shape[1:], n)
        )
        x = torch.randn(4, *model.shape)
        many = {key: value.expand(4, *value.shape[1:]).contiguous() for key, value in cond.items()}
        with Live() as live:
            model.velocity(x, torch.full((4,), 0.5), many).square().mean().backward()
        told = estimate(model_spec, precision="fp32", checkpointing=on)
        peaks[on] = live.peak, 4 * told.row + 4 * told.trained
    for on, (real, told) in peaks.items():
        assert 0.6 * real < told < 1.1 * real, (on, peaks)
    assert peaks[True][0] < 0.5 * peaks[False][0]
