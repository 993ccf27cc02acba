"""Download of a model: the files that diffusers loads, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..assets import downloads, weight_store
from ..errors import Missing, UserError
from ..model_spec import ModelSpec
from ..progress import Progress
from .disk import require_free_disk
from .inventory import Advance

# Weights under their plain name: `model.fp16.safetensors` and `diffusion_pytorch_model.non_ema.safetensors` are variants.
PLAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Parts of a pipeline that no model class of bench/models loads.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def diffusers_files(index: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the files of a repository that diffusers loads: those of the parts in model_index.json, under plain names."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    parts = {name for name, entry in entries.items() if all(entry) and name not in UNUSED_PARTS}
    files = ["model_index.json"]
    for name in sorted(names):
        part, _, rest = name.partition("/")
        leaf = rest.rpartition("/")[2]
        is_weights = ".safetensors" in leaf
        if (
            part in parts
            and downloads.matches(name, weight_store.PIPELINE)
            and (PLAIN_WEIGHTS.fullmatch(leaf) or not is_weights)
        ):
            files.append(name)
    return files


def fetch_pipeline(model_spec: ModelSpec, progress: Progress) -> None:
    """Download the files of a model into the hub's cache and note them in the ledger. Raises Missing where they cannot be had."""
    revision = model_spec.revision or "main"
    if downloads.offline():
        if weight_store.local(model_spec.source, revision) is None:
            raise weight_store.refused(model_spec.source, "", revision, OSError("it is not here"))
        return
    local = weight_store.local(model_spec.source, revision)
    if (
        local is not None and "snapshots" not in local.parts
    ):  # a folder of the person's or the store, preferred to the hub
        return
    try:
        commit, files = weight_store.listing(model_spec.source, revision, "model_index.json")
    except Missing as missing:
        if local is None:
            raise
        progress.message(f"only files that were fetched before are checked: {missing}")
        return
    index = weight_store.download(model_spec.source, "model_index.json", revision)
    names = diffusers_files(json.loads(index.read_text("utf-8")), files)
    absent = [name for name in names if weight_store.cached(model_spec.source, name, commit) is None]
    size = sum(files[name].bytes for name in absent)
    require_free_disk(Path(_hub_cache()), size, model_spec.source)
    progress.phase(f"fetching {model_spec.name}", float(size or 1))
    for name in absent:
        weight_store.download(model_spec.source, name, commit, _progress_bar(progress.advance))
    index_path = weight_store.cached(model_spec.source, "model_index.json", commit)
    if index_path is None:
        raise UserError(f"{model_spec.source} changed while it was fetched: run the same command again")
    for name in names:
        downloads.note(
            downloads.DownloadRequest("file", model_spec.source, (name,), revision, index_path.parent / name)
        )
    # `weight_store.local` reads this note as: no file of these patterns is left to be fetched.
    downloads.note(
        downloads.DownloadRequest("folder", model_spec.source, weight_store.PIPELINE, revision, index_path.parent)
    )


def _progress_bar(advance: Advance) -> type:
    """Return a progress bar class for the hub's library that draws nothing and passes the bytes on."""
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):  # type: ignore[type-arg]  # the library asks for a subclass of its own
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            advance(float(n or 0))
            return None

    return SilentBar


def _hub_cache() -> str:
    """Return the folder of the hub's cache."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
