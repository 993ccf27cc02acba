"""Measures memory and training speed of each method on Stable Diffusion 3.5 Medium at full size with random weights on a GPU.

The real architecture (2.2 billion parameters in the transformer, the 16-channel autoencoder, CLIP-L, CLIP-G, T5-XXL cut to
one layer: prompts are encoded once and cached, so its depth affects neither speed nor, off-loaded, memory), random
weights, bfloat16, 512 px, 10 rollout steps with guidance 4.5, the LoRA of rank 32. Prints Markdown: peak memory, images/s of the
rollout, and per method seconds and peak memory of one iteration of 2 prompts x 4 images, one row a backward.
Run on a GPU: python benchmarks/full_size.py [method ...]
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.experiments import config
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models import loading, sd3
from gpobench.bench.models.tiny_parts import build_silent_tokenizer, build_tokenizer
from gpobench.bench.spec import Prompt, Scores, Search
from gpobench.bench.training import train
from gpobench.bench.training.rig import MeteredRig

GB = 2**30
TRANSFORMER: dict[str, Any] = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip
AUTOENCODER: dict[str, Any] = dict(
    in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32,
    sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip


def pipeline(dtype: torch.dtype) -> Any:
    """The pipeline with random weights on the GPU."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def clip(width: int, layers: int, heads: int, act: str) -> Any:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
                projection_dim=width, hidden_act=act, eos_token_id=49407, bos_token_id=49406,
            )
        )  # fmt: skip

    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            parts = {
                "transformer": SD3Transformer2DModel(**TRANSFORMER),
                "vae": AutoencoderKL(**AUTOENCODER),
                "text_encoder": clip(768, 12, 12, "quick_gelu"),
                "text_encoder_2": clip(1280, 32, 20, "gelu"),
                "text_encoder_3": T5EncoderModel(
                    T5Config(d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=1)
                ),
            }
    finally:
        torch.set_default_dtype(old)
    tokenizer, third = build_tokenizer(), build_silent_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=third,
        **parts,
    )


class Brightness:
    """A scorer of negligible cost that gives different images different scores."""

    id, name, metrics = "brightness-v1", "brightness", ("mean",)

    def __call__(self, images: Any, prompts: Any) -> Scores:
        return Scores({"mean": images.mean((1, 2, 3), dtype=np.float64)})


def shrunk(settings: Any) -> Any:
    """The settings with two prompts, four images each, ten steps and one row a backward; other sizes scale from it."""
    names = {f.name for f in fields(settings)}
    small = {"prompts": 2, "group": 4, "steps": 10}
    return replace(
        settings,
        **{k: v for k, v in small.items() if k in names},
        optim=replace(settings.optim, micro=1, minibatches=1),
    )


def main(names: list[str]) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU")
    model_spec = find_model_spec("sd35m")
    loading.load_pipeline = lambda pipeline_class, model_spec, dtype, **options: pipeline(dtype)
    began = time.perf_counter()
    model = sd3.SD3(model_spec, device="cuda", precision="bf16", adapter=model_spec.adapter)
    count = sum(p.numel() for p in model.network.parameters()) / 1e9
    trained = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: transformer {count:.2f} billion parameters, "
        f"LoRA {trained:.1f} million,"
    )
    print(
        f"{torch.cuda.memory_allocated() / GB:.1f} GB with all parts loaded, built in {time.perf_counter() - began:.0f} s,",
        end=" ",
    )
    print(f"{model.flops_a_forward() / 1e12:.2f} TFLOP a forward\n", flush=True)
    rig = MeteredRig(
        model,
        [Prompt(w) for w in ("a red circle", "two blue squares", "a photo")],
        Brightness(),
        Meter(Budget(nfe=1e12)),
        rows=8,
    )
    for rows in (1, 8, 16):
        torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        for _ in range(3):
            began = time.perf_counter()
            with torch.no_grad():
                model.decode(rig.sample(rig.noise(rows), torch.zeros(rows, dtype=torch.long), steps=10, guidance=4.5))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        print(
            f"rollout of {rows}: {rows / min(seconds[1:]):.2f} images/s, peak {torch.cuda.max_memory_allocated() / GB:.1f} GB",
            flush=True,
        )
    print("\n| method | s an iteration | of it rollout | nfe | updates | peak GB |\n|---|---|---|---|---|---|")
    for name in names or [n for n in registry.entries("method") if registry.canonical("method", n) == n]:
        settings = config.resolve(config.RunRequest(name, "ocr", "sd35m")).settings
        if not isinstance(settings, Search):
            print(f"| {name} | {train_a_little(shrunk(settings), model, rig.train_prompts)} |", flush=True)


@dataclass
class TimedMethod:
    """A method that records when each collect begins and how long it takes."""

    method: Any
    optim: Any
    began: float = 0.0
    rollout: float = 0.0

    def collect(self, rig: MeteredRig) -> Any:
        self.began = clock()
        batch = self.method.collect(rig)
        self.rollout = clock() - self.began
        return batch

    def loss(self, rig: MeteredRig, batch: Any) -> Any:
        return self.method.loss(rig, batch)


def clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def train_a_little(settings: Any, model: Any, book: Any) -> str:
    """The cells of one row, of the second iteration: the first one includes the one-time cost of the allocator."""
    meter = Meter(Budget(nfe=1e12))
    rig, timed = MeteredRig(model, book, Brightness(), meter, rows=8), TimedMethod(settings, settings.optim)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ends: list[float] = []
    train.train(
        timed, rig, train.optimiser(settings, rig),  # type: ignore[arg-type]
        after=lambda numbers: ends.append(clock()),
        interrupted=lambda: rig.iteration >= 2,
    )  # fmt: skip
    rig.close()
    peak = torch.cuda.max_memory_allocated() / GB
    return f"{ends[1] - timed.began:.2f} | {timed.rollout:.2f} | {meter.nfe // 2} | {meter.updates // 2} | {peak:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
