"""Model specs of names and folders; a folder that is no pipeline is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import Adapter, ModelSpec, find_model_spec


def test_a_folder_states_its_own_protocol(tiny_pipe: Path) -> None:
    model_spec = find_model_spec(str(tiny_pipe))
    assert (
        model_spec.steps,
        model_spec.guidance,
        model_spec.height,
        model_spec.width,
        model_spec.max_sequence_length,
    ) == (4, 1.0, 16, 16, 1)
    assert (
        model_spec.pipeline == "StableDiffusion3Pipeline"
        and model_spec.domain == "glyphs"
        and model_spec.name == tiny_pipe.name
    )
    assert model_spec.budget == model_spec.preset == "tiny" and model_spec.revision is None


def test_a_folder_without_a_recipe_gets_the_published_protocol(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    model_spec = find_model_spec(str(tmp_path))
    assert (model_spec.steps, model_spec.guidance, model_spec.domain) == (40, 4.5, "open")


@pytest.mark.parametrize(
    ("pipeline", "size", "steps", "guidance"),
    [
        ("FluxPipeline", 720, 28, 3.5),
        ("StableDiffusionXLPipeline", 1024, 50, 5.0),
        ("StableDiffusionPipeline", 512, 50, 7.5),
    ],
)
def test_the_class_decides_the_protocol(tmp_path: Path, pipeline: str, size: int, steps: int, guidance: float) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    model_spec = find_model_spec(str(tmp_path))
    assert (model_spec.height, model_spec.width, model_spec.steps, model_spec.guidance) == (size, size, steps, guidance)
    assert model_spec.checkpointing and model_spec.offload and model_spec.negative_prompt is None
    assert ("add_q_proj" in model_spec.adapter.targets) == (pipeline == "FluxPipeline")


@pytest.mark.parametrize(
    ("index", "recipe", "said"),
    [
        (None, None, "no model_index.json"),
        ("{", None, "cannot be read"),
        ("[1]", None, "cannot be read"),
        ("{}", "{", "cannot be read"),
        ("{}", json.dumps({"steps": 4, "height": 16, "width": 16, "max_sequence_length": 1}), "'guidance'"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused(
    tmp_path: Path, index: str | None, recipe: str | None, said: str
) -> None:
    for name, text in (("model_index.json", index), ("recipe.json", recipe)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        find_model_spec(str(tmp_path))
    assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_no_card_is_refused(redness: str) -> None:
    with pytest.raises(UserError, match="is not a gpobench.bench.model_spec.ModelSpec"):
        find_model_spec(f"{redness}:Paint")


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0}, {"targets": ()}])
def test_an_adapter_needs_rank_alpha_and_targets(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="adapter"):
        Adapter(**bad)  # type: ignore[arg-type]
    assert ModelSpec(name="x", source="y").adapter.rank == 32
