"""The cache of embeddings: each prompt is encoded once, and what left memory comes back to the same bits."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.training.embeddings import MEGABYTES, EmbeddingCache, memory_limit

EACH = 7 * 4 * 2 + 3 * 4  # bytes of one embedding


class Encoder:
    """Embeds a text as numbers drawn from it, and counts how often."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.calls.update(texts)
        draw = lambda text: torch.Generator().manual_seed(sum(map(ord, text)) * 31 + len(text))
        return {
            "tokens": torch.stack([torch.randn(7, 4, generator=draw(text)) for text in texts]).bfloat16(),
            "pooled": torch.stack([torch.randn(3, generator=draw(text)) for text in texts]),
        }


@given(
    asked=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5), max_size=12), kept=st.integers(0, 9)
)
def test_any_limit_gives_the_same_bits_and_encodes_each_prompt_once(asked: list[list[str]], kept: int) -> None:
    encoder, plain = Encoder(), Encoder()
    cache = EmbeddingCache(encoder, limit=kept * EACH)
    for texts in asked:
        embeddings, wanted = cache(texts), plain(texts)
        assert embeddings.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(embeddings[key], value) and embeddings[key].dtype == value.dtype
        assert cache.bytes_in_memory <= kept * EACH
    assert set(encoder.calls.values()) <= {1}


def test_what_was_used_last_stays_in_memory() -> None:
    encoder = Encoder()
    cache = EmbeddingCache(encoder, limit=2 * EACH)
    for text in "abac":
        cache([text])
    cache._on_disk.clear()  # pyright: ignore[reportPrivateUsage]
    cache(["a", "c"])
    assert encoder.calls == {"a": 1, "b": 1, "c": 1}
    cache(["b"])
    assert encoder.calls["b"] == 2


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_gone_or_damaged_costs_an_encoding_and_nothing_else(damage: str) -> None:
    encoder = Encoder()
    cache = EmbeddingCache(encoder, limit=0)
    first = cache(["a"])
    (path,) = cache._on_disk.values()  # pyright: ignore[reportPrivateUsage]
    shutil.rmtree(path.parent) if damage == "gone" else path.write_bytes(path.read_bytes()[:20])
    again = cache(["a"])
    assert encoder.calls["a"] == 2 and all(torch.equal(first[key], again[key]) for key in first)


def test_without_room_on_disk_prompts_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    encoder = Encoder()
    cache = EmbeddingCache(encoder, limit=0)
    assert all(torch.equal(cache(["a"])[key], Encoder()(["a"])[key]) for key in ("tokens", "pooled"))
    assert encoder.calls["a"] == 2 and cache.bytes_in_memory == 0


@pytest.mark.parametrize("text", ["-1", "much", "nan", "inf"])
def test_a_limit_that_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(MEGABYTES, text)
    with pytest.raises(UserError, match=f"{MEGABYTES} is a number of megabytes, got '{text}'"):
        memory_limit()
    monkeypatch.setenv(MEGABYTES, "0.5")
    assert memory_limit() == 5e5


def test_the_last_batch_is_put_together_once() -> None:
    """Every step of a rollout asks for the embeddings of the same rows."""
    cache = EmbeddingCache(Encoder(), limit=1e9, device=torch.device("cpu"))
    first, again, other = cache(["a", "b"]), cache(["a", "b"]), cache(["b", "a"])
    assert all(again[key] is first[key] and other[key] is not first[key] for key in first)
    assert all(torch.equal(other[key], first[key].flip(0)) for key in first)
