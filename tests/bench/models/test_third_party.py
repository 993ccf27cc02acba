"""A third party adds a pipeline class in one file: it opens, is trained, saves its adapter and loads it again."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import record
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.base import PipelineModel
from gpobench.bench.models.memory import estimate
from gpobench.bench.models.open import open_model, usage
from gpobench.bench.progress import NullProgress
from gpobench.bench.spec import Model

# The whole package. Its pipeline is a diffusers class of its own, with another conditioning than the four built-in ones have: the
# text is read once forward and once backward.
PACKAGE = '''"""Mirror Diffusion: a pipeline that reads its prompts in both directions."""
from typing import final

import torch
from diffusers import StableDiffusion3Pipeline

from gpobench.bench.flow import rectified
from gpobench.bench.models.autoencoder import latent_shape
from gpobench.bench.models.base import CLIP_TOKENS, PipelineModel, meta


class MirrorPipeline(StableDiffusion3Pipeline):
    """Pretends to be of another library than diffusers."""


@final
class Mirror(PipelineModel):
    pipeline = "MirrorPipeline"
    network_name = "transformer"
    protocol = {"height": 16, "width": 16, "steps": 3, "guidance": 2.0, "max_sequence_length": 1}
    call_options = ("max_sequence_length",)

    @classmethod
    def diffusers_class(cls):
        return MirrorPipeline

    def configure(self):
        config, factor = self.network.config, self.pipe.vae_scale_factor
        self.path, self.prediction = rectified, "velocity"
        self.shape = latent_shape(config.in_channels, self.spec, factor, config.patch_size)

    def published_times(self, steps):
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.clone().float()

    def embed(self, prompts):
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return {"text": torch.cat([text, text.flip(1)], 1), "pooled": pooled}

    def forward(self, x, t, cond, guidance):
        return self.network(
            x.to(self.dtype), cond["text"].to(self.dtype), cond["pooled"].to(self.dtype), t * 1000, return_dict=False
        )[0].float()

    @classmethod
    def text_tokens(cls, model_spec):
        return 2 * (CLIP_TOKENS + model_spec.max_sequence_length)

    @staticmethod
    def network_inputs(config, height, width, tokens, dtype):
        return {
            "hidden_states": meta(dtype, 1, config.in_channels, height, width),
            "timestep": meta(torch.float32, 1),
            "encoder_hidden_states": meta(dtype, 1, tokens, config.joint_attention_dim),
            "pooled_projections": meta(dtype, 1, config.pooled_projection_dim),
        }
'''


@pytest.fixture
def mirror(tiny_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a MirrorPipeline, with the package that serves it installed as pip would leave it."""
    site = tmp_path / "site"
    info = site / "mirror_diffusion-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mirror_diffusion.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mirror-diffusion\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[gpobench.pipelines]\nMirrorPipeline = mirror_diffusion:Mirror\nBrokenPipeline = mirror_diffusion:MirrorPipeline\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "mirror_diffusion", raising=False)
    folder = tmp_path / "mirror"
    shutil.copytree(tiny_pipe, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "MirrorPipeline"}))
    return folder


def test_a_third_partys_pipeline_class_is_trained_and_its_adapter_loads(
    mirror: Path, redness: str, tmp_path: Path
) -> None:
    sets = ["prompts=2", "group=4", "optim.lr=3e-3"]
    plan = resolve(RunRequest("gpo", f"{redness}:Paint", str(mirror), budget="nfe=400", sets=sets))
    done = running.run(plan, runs=tmp_path / "runs", progress=NullProgress())
    assert done.spent["updates"] >= 2 and done.stop == "budget: nfe"
    run_dir = cast(Any, record.read(tmp_path / "runs" / plan.slug() / "record.json")).run_dir
    drawn: list[Any] = []
    for adapter in (None, Path(run_dir, "adapter")):
        model: Model = open_model(find_model_spec(str(mirror)), device="cpu")
        if adapter is not None:
            model.load_adapter(adapter)
        x, cond = (
            torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)),
            model.encode(["a red circle"]),
        )
        with torch.no_grad():
            drawn.append(model.velocity(x, torch.tensor([0.5]), cond).numpy())
    assert np.isfinite(drawn[1]).all() and not np.array_equal(drawn[0], drawn[1])


def test_its_class_members_say_what_a_folder_an_estimate_and_a_model_card_need(mirror: Path) -> None:
    (mirror / "recipe.json").unlink()
    model_spec = find_model_spec(str(mirror))
    assert (model_spec.height, model_spec.steps, model_spec.guidance, model_spec.domain) == (16, 3, 2.0, "open")
    told = estimate(replace(model_spec, precision="fp32"))
    model = open_model(model_spec, device="cpu", precision="fp32", adapter=model_spec.adapter)
    assert told.trained == sum(p.numel() for p in model.parameters()) and told.source == "config files"
    assert usage(model_spec)[1] == 'pipe = MirrorPipeline.from_pretrained("PATH/TO/mirror")'
    assert "max_sequence_length=1" in usage(model_spec)[-1]


def test_an_entry_point_that_is_no_pipeline_class_is_refused(mirror: Path) -> None:
    model_spec = replace(find_model_spec(str(mirror)), pipeline="BrokenPipeline")
    with pytest.raises(UserError, match="'BrokenPipeline' is not a gpobench.bench.models.base.PipelineModel"):
        open_model(model_spec, device="cpu")


@pytest.mark.parametrize("name", list(registry.entries("pipeline")))
def test_a_pipeline_class_is_final_and_all_above_it_are_abstract(name: str) -> None:
    registered = registry.load("pipeline", name)
    assert registered.pipeline == name and registered.__final__ and not registered.__abstractmethods__
    above = [kind for kind in registered.__mro__[1:] if issubclass(kind, PipelineModel)]
    assert above[-1] is PipelineModel and all(kind.__abstractmethods__ for kind in above)
