"""Writes a trained embedded model as a folder that `StableDiffusion3Pipeline.from_pretrained` loads, with its record and model card."""

import json
import os
import platform
import shutil
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn

from .pipeline_recipe import PictureSource, PipelineRecipe
from .recipe_fit import Log, Workers
from .tiny_parts import T5_TOKENS, TinyModules, build_silent_text, build_silent_tokenizer, build_tokenizer


@dataclass(frozen=True)
class Run:
    """State that the stages share: recipe, seed, processes, device, number type and output."""

    recipe: PipelineRecipe
    seed: int
    workers: Workers
    dtype: torch.dtype  # of the networks' forward passes
    out: Path
    log: Log

    @property
    def state(self) -> Path:
        """Return the folder of the state from which a stopped run resumes."""
        return self.out / ".state"

    def autocast(self) -> Any:
        """Make networks compute in the run's number type inside the context."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def publish(run: Run, parts: TinyModules, drawn: PictureSource, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the pipeline in float16, measure what was written, and move it into the run's folder in one go."""
    fresh, recipe = run.state / "pipeline", run.recipe
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = _pipeline(recipe, parts)
    pipe.to(torch.float16)
    pipe.save_pretrained(str(fresh), safe_serialization=True)
    _portable(fresh)
    scores = drawn.measure(fresh, run.seed)
    text = json.dumps(_record(run, pipe, seconds, scores) | dict(drawn.held_out()), indent=1)
    record = json.loads(text)  # as read back from the file: lists, no tuples
    (fresh / "recipe.json").write_text(text + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(drawn.model_card(record, fresh), encoding="utf-8")
    for entry in sorted(fresh.iterdir()):
        target = run.out / entry.name
        if target.is_dir():
            target.rename(run.state / f"old-{time.time_ns()}")
        os.replace(entry, target)
    shutil.rmtree(run.state)
    run.log({"stage": "published", **{name: score["mean"] for name, score in scores.items()}})
    return record


def _pipeline(recipe: PipelineRecipe, parts: TinyModules) -> StableDiffusion3Pipeline:
    tokenizer = build_tokenizer(recipe.canvas)
    return StableDiffusion3Pipeline(
        transformer=deepcopy(parts.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=deepcopy(parts.autoencoder),
        text_encoder=deepcopy(parts.text_one),
        # the pipeline's annotations name CLIP's own tokenizer only
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder_2=deepcopy(parts.text_two),
        tokenizer_2=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder_3=build_silent_text(sum(recipe.text_widths)),
        tokenizer_3=build_silent_tokenizer(),
    )


def _record(
    run: Run, pipe: StableDiffusion3Pipeline, seconds: dict[str, float], scores: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of recipe.json: settings, training, versions, sizes and scores."""
    recipe = run.recipe
    steps = {"autoencoder": recipe.autoencoder_steps, "flow": recipe.steps, "decoder": recipe.decoder_steps}
    return {
        "fields": asdict(recipe),
        "seed": run.seed,
        "max_sequence_length": T5_TOKENS,
        "guidance": 1.0,
        "steps": 10,
        "drop_last_step": True,  # from t = .001
        "height": recipe.canvas.height,
        "width": recipe.canvas.width,
        "trained": {
            "steps": steps,
            "samples": {stage: count * recipe.batch for stage, count in steps.items()},
            "wall_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in sorted(pipe.components.items())
            if isinstance(module, nn.Module)
        },
        "scores": scores,
    }


def plain(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Copy a module without the compiled calls, which cannot be copied."""
    # from_config returns a pair only with return_unused_kwargs
    copy = cast(AutoencoderKL, AutoencoderKL.from_config(autoencoder.config))
    copy.load_state_dict(autoencoder.state_dict())
    return copy.eval()


def _portable(folder: Path) -> None:
    """Write a tokenizer class name that every transformers knows, and settings with which `from_pretrained` loads float32 throughout.

    transformers 5 writes a class name of its own, and loads text encoders in the type they were saved in, where diffusers loads
    the rest in float32: the two would not fit together.
    """
    changes = {"model_index.json": ("TokenizersBackend", "PreTrainedTokenizerFast")}
    changes["tokenizer*/tokenizer_config.json"] = changes["model_index.json"]
    changes["text_encoder*/config.json"] = ('"dtype": "float16"', '"dtype": "float32"')
    for pattern, (old, new) in changes.items():
        for path in folder.glob(pattern):
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
