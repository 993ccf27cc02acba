"""Embeddings of prompts: each is computed once; beyond a number of bytes the least recently used ones wait on disk.

On SD3.5 in bf16 a prompt takes 1.7 MB and on FLUX 4.2 MB, so the thousands of prompts of a long run do not fit in memory for ever.
What was computed once is read back to the same bits, so the limit changes no result.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..errors import UserError
from ..spec import Cond

MEGABYTES = "GPOBENCH_EMBEDDINGS_MB"  # environment variable: the limit, in MB of 1e6 bytes
DEFAULT_MEGABYTES = 2000.0


def memory_limit() -> float:
    """Return the bytes of embeddings that stay in memory. Raises UserError on a value of the variable that is no such number."""
    text = os.environ.get(MEGABYTES, "")
    try:
        megabytes = float(text or DEFAULT_MEGABYTES)
    except ValueError:
        megabytes = -1.0
    if not 0 <= megabytes < float("inf"):
        raise UserError(f"{MEGABYTES} is a number of megabytes, got {text!r}")
    return megabytes * 1e6


class EmbeddingCache:
    """Maps prompts to a model's embeddings, each computed by itself: in a batch with other texts its last bits would differ."""

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Cond],
        limit: float | None = None,
        device: torch.device | None = None,
    ):
        """Make an empty cache.

        Args:
            encode: B prompts -> tensors that lead with B, `spec.Model.encode`.
            limit: bytes kept in memory; None: `memory_limit`.
            device: to which a batch of embeddings is moved; None leaves it where they were encoded.
        """
        self._encode, self._limit = encode, memory_limit() if limit is None else limit
        self._in_memory: OrderedDict[str, Cond] = (
            OrderedDict()
        )  # without the leading dimension; the last used one is last
        self._bytes = 0
        self._on_disk: dict[str, Path] = {}
        self._device = torch.device("cpu")
        self._folder: TemporaryDirectory[str] | None = None
        self._target = device
        self._batch: tuple[tuple[str, ...], Cond] | None = None  # the texts and embeddings of the last call

    def __call__(self, texts: Sequence[str]) -> Cond:
        """The embeddings of B prompts: tensors that lead with B.

        The last batch is kept, beside the limit and where it is not larger: all steps of a rollout, and policy and reference of an
        update, ask for the same one.
        """
        if self._batch is not None and self._batch[0] == tuple(texts):
            return self._batch[1]
        embeddings = {text: self._embedding(text) for text in dict.fromkeys(texts)}
        first = embeddings[texts[0]]
        stacked = {key: torch.stack([embeddings[text][key] for text in texts]) for key in first}
        self._make_room()
        if self._target is not None:
            stacked = {key: _moved(value, self._target) for key, value in stacked.items()}
        self._batch = (tuple(texts), stacked) if _size(stacked) <= self._limit else None
        return stacked

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the embeddings that are in memory."""
        return self._bytes

    def _embedding(self, text: str) -> Cond:
        if text not in self._in_memory:
            embedding = self._read(text)
            if embedding is None:
                embedding = {key: value[0] for key, value in self._encode([text]).items()}
            self._in_memory[text] = embedding
            self._bytes += _size(embedding)
        self._in_memory.move_to_end(text)
        return self._in_memory[text]

    def _make_room(self) -> None:
        """Move the least recently used embeddings to disk until the others are within the limit."""
        while self._bytes > self._limit and self._in_memory:
            text, embedding = self._in_memory.popitem(last=False)
            self._bytes -= _size(embedding)
            if text not in self._on_disk:
                self._write(text, embedding)

    def _write(self, text: str, embedding: Cond) -> None:
        """Store an embedding; where the disk has no room for it, it is computed again when it is needed."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with suppress(OSError, SafetensorError):
            self._folder = self._folder or TemporaryDirectory(prefix="gpobench-embeddings-")
            path = Path(self._folder.name, f"{len(self._on_disk)}.safetensors")
            self._device = next((value.device for value in embedding.values()), self._device)
            save_file({key: value.contiguous().cpu() for key, value in embedding.items()}, path)
            self._on_disk[text] = path

    def _read(self, text: str) -> Cond | None:
        """Read a stored embedding; None where there is none, or its file is gone."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if (path := self._on_disk.get(text)) is None:
            return None
        try:
            return {key: value.to(self._device) for key, value in load_file(path).items()}
        except (OSError, SafetensorError):
            del self._on_disk[text]
            return None


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; a GPU copies it from pinned memory while the processor goes on."""
    if value.device.type == "cpu" and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _size(embedding: Cond) -> int:
    return sum(value.numel() * value.element_size() for value in embedding.values())
