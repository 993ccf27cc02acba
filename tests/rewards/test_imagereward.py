"""The reward network against a second one, written from the publication's names, on small random weights in the published format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.spec import Prompt
from gpobench.rewards import imagereward
from gpobench.rewards.imagereward import DEVIATION, MEAN, Eye, ImageReward

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

State = dict[str, "torch.Tensor"]
EYE = Eye(size=32, patch=8, width=24, depth=2, heads=3)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a an red blue circle square of the on in photo cat dog ##s tree".split()
MED = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 768,
    "add_cross_attention": True,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


# The second network: plain functions over the published names, in float64


def random_state(seed: int = 0) -> State:
    """Random numbers under every name of ImageReward.pt, for the small shapes above."""
    g = torch.Generator().manual_seed(seed)
    state: State = {}

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=g) * gain / into**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=g)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=g)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=g)

    width, text, inner = EYE.width, MED["hidden_size"], MED["intermediate_size"]
    eye, bert = "blip.visual_encoder", "blip.text_encoder"
    places = (EYE.size // EYE.patch) ** 2 + 1
    small = 0.003  # beside it the epsilon of the image half's normalisations counts
    state[f"{eye}.cls_token"] = small * torch.randn(1, 1, width, generator=g)
    state[f"{eye}.pos_embed"] = small * torch.randn(1, places, width, generator=g)
    state[f"{eye}.patch_embed.proj.weight"] = small / 5 * torch.randn(width, 3, EYE.patch, EYE.patch, generator=g)
    state[f"{eye}.patch_embed.proj.bias"] = small * torch.randn(width, generator=g)
    for i in range(EYE.depth):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width, 2.0)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{eye}.norm", width)
    state[f"{bert}.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    state[f"{bert}.embeddings.word_embeddings.weight"] = torch.randn(MED["vocab_size"], text, generator=g)
    state[f"{bert}.embeddings.position_embeddings.weight"] = torch.randn(
        MED["max_position_embeddings"], text, generator=g
    )
    norm(f"{bert}.embeddings.LayerNorm", text)
    for i in range(MED["num_hidden_layers"]):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, source in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", text, text, 2.0)
            linear(f"{layer}.{attention}.self.key", text, source, 2.0)
            linear(f"{layer}.{attention}.self.value", text, source)
            linear(f"{layer}.{attention}.output.dense", text, text)
            norm(f"{layer}.{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", inner, text)
        linear(f"{layer}.output.dense", text, inner)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", 16, width)
    linear("blip.text_proj", 16, text)
    widths = (text, *imagereward.WIDTHS)
    for place, into, out in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        linear(f"mlp.layers.{place}", out, into, 1.5)
    return state


# Of a score of size 1: float32 through some fifty products, each right to 1e-6 on any processor.
ROUNDING = 5e-5


def reference(state: State, image: np.ndarray, ids: list[int]) -> float:
    """One picture (32, 32, 3) uint8 and the token ids of its text without padding -> the standardised reward."""
    s = {key: value.double() for key, value in state.items() if value.is_floating_point()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        away = x - x.mean(-1, keepdim=True)
        return away / ((away**2).mean(-1, keepdim=True) + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        parts = [
            torch.softmax(a @ b.T / a.shape[1] ** 0.5, -1) @ c
            for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
        ]
        return torch.cat(parts, 1)

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    eye, bert, n, p = "blip.visual_encoder", "blip.text_encoder", EYE.size // EYE.patch, EYE.patch
    mean = np.array((0.48145466, 0.4578275, 0.40821073))
    pixels = torch.from_numpy((image / 255 - mean) / np.array((0.26862954, 0.26130258, 0.27577711)))
    patches = pixels.reshape(n, p, n, p, 3).permute(0, 2, 4, 1, 3).reshape(n * n, 3 * p * p)
    x = patches @ s[f"{eye}.patch_embed.proj.weight"].flatten(1).T + s[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([s[f"{eye}.cls_token"][0], x]) + s[f"{eye}.pos_embed"][0]
    for i in range(EYE.depth):
        block = f"{eye}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, 1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, EYE.heads))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{eye}.norm", x, 1e-6)

    words, places = (s[f"{bert}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    y = norm(f"{bert}.embeddings.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
    for i in range(MED["num_hidden_layers"]):
        layer = f"{bert}.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            a = f"{layer}.{attention}"
            source = y if attention == "attention" else seen
            q, k, v = (linear(f"{a}.self.query", y), linear(f"{a}.self.key", source), linear(f"{a}.self.value", source))
            found = linear(f"{a}.output.dense", attend(q, k, v, MED["num_attention_heads"]))
            y = norm(f"{a}.output.LayerNorm", found + y, 1e-12)
        found = linear(f"{layer}.output.dense", gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", found + y, 1e-12)
    reward = y[:1]
    for place in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{place}", reward)
    return (reward.item() - MEAN) / DEVIATION


def ids_of(text: str) -> list[int]:
    """Whole words only: [CLS], at most 33 words, [SEP]."""
    return [2, *(WORDS.index(word) if word in WORDS else 1 for word in text.lower().split())][:34] + [3]


# The scorer


def write(root: Path, state: State) -> None:
    (root / "THUDM/ImageReward").mkdir(parents=True, exist_ok=True)
    (root / "google-bert/bert-base-uncased").mkdir(parents=True, exist_ok=True)
    torch.save(state, root / "THUDM/ImageReward/ImageReward.pt")
    (root / "THUDM/ImageReward/med_config.json").write_text(json.dumps(MED))
    (root / "google-bert/bert-base-uncased/vocab.txt").write_text("\n".join(WORDS) + "\n")


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


@pytest.fixture
def root(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path, state)
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("GPOBENCH_SCORER_DEVICE", "cpu")
    return tmp_path


@pytest.fixture
def scorer(root: Path) -> ImageReward:
    return ImageReward(EYE)


def pictures(n: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Noise of growing contrast: pictures that a random network tells apart."""
    noise = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3))
    return (noise * np.linspace(0.3, 1, n)[:, None, None, None]).astype(np.uint8)


TEXTS = ["a red circle", "A BLUE SQUARE", "a cat on the tree", "the unknownword of dog", "photo"]


def test_rewards_are_those_of_the_published_names(scorer: ImageReward, state: State) -> None:
    images = pictures(5)
    got = scorer(images, [Prompt(text) for text in TEXTS])
    want = np.array([reference(state, image, ids_of(text)) for image, text in zip(images, TEXTS, strict=True)])
    assert not got.reasons and np.allclose(got.value["imagereward"], want, atol=ROUNDING)
    assert want.std() > 0.05  # and they say something
    swapped = reference(state, images[0], ids_of(TEXTS[1])), reference(state, images[1], ids_of(TEXTS[0]))
    assert min(abs(swapped[0] - want[0]), abs(swapped[1] - want[1])) > 1e-3  # of the picture and of the prompt


def test_a_prompt_ends_after_35_tokens(scorer: ImageReward, state: State) -> None:
    image = pictures(1)[0]
    long = " ".join(["red", "cat", "tree"] * 11)  # 33 words and two marks
    assert scorer.score(image, long + " dog dog") == scorer.score(image, long)
    assert scorer.score(image, long) == pytest.approx(reference(state, image, ids_of(long)), abs=ROUNDING)
    assert scorer.score(image, long[:-4]) != scorer.score(image, long)


def test_a_row_is_its_own_pair(scorer: ImageReward) -> None:
    """The published wrapper once scored a batch's cross product: no row may depend on its neighbours."""
    images, prompts = pictures(5, 48, 40), [Prompt(text) for text in TEXTS]
    together = scorer(images, prompts).value["imagereward"]
    looped = [scorer(images[i : i + 1], prompts[i : i + 1]).value["imagereward"][0] for i in range(5)]
    assert np.array_equal(together, looped) and len(set(looped)) == 5
    order = [3, 0, 4, 1, 2]
    assert np.array_equal(scorer(images[order], [prompts[i] for i in order]).value["imagereward"], together[order])


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (33, 47), (47, 33), (32, 65), (100, 31), (17, 20)])
def test_pictures_are_framed_as_published(shape: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    image = pictures(1, *shape)[0]
    published = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    assert torch.allclose(imagereward.square(image, 32), published(Image.fromarray(image)), atol=1e-6)


def test_the_published_shape_is_the_default() -> None:
    """ViT-L/16 at 224 and 24 layers; the names of the file cover the network exactly, 446 million weights (on no memory)."""
    eye, med = Eye(), {**MED, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    med |= {"num_attention_heads": 12, "max_position_embeddings": 512, "vocab_size": 30_524}
    with torch.device("meta"):
        empty = imagereward.network(eye, med)
    text = sum(value.numel() for key, value in empty.state_dict().items() if key.startswith("text."))
    sight = sum(value.numel() for key, value in empty.state_dict().items() if key.startswith("eye."))
    # counted by hand: ViT-L/16 without its classifier; BERT base without types and pooler, with cross-attention to 1024
    assert sight == 24 * (12 * 1024**2 + 13 * 1024) + (3 * 256 + 1) * 1024 + 198 * 1024 + 2 * 1024
    layer = 12 * 768**2 + 13 * 768 + 2 * 768**2 + 2 * 1024 * 768 + 6 * 768
    assert text == 12 * layer + (30_524 + 512 + 2) * 768
    assert empty["text"].encoder.layer[0].attention.self.num_attention_heads == 12
    assert empty["eye"].post_layernorm.eps == 1e-6


def test_names_map_one_to_one(state: State) -> None:
    used = [key for key in state if not key.startswith(imagereward.UNUSED)]
    names = {imagereward.renamed(key) for key in used}
    assert len(names) == len(used) and names == set(imagereward.network(EYE, MED).state_dict())


def test_id_says_what_changes_numbers(scorer: ImageReward, root: Path) -> None:
    engine, weights, frame, tokens, kind = scorer.id.split("/")
    assert (engine, frame, tokens, kind) == ("imagereward-1.0", "crop32-pil-bicubic", "35-tokens", "float32")
    assert weights.startswith("ImageReward@") and (scorer.name, *scorer.metrics) == ("imagereward", "imagereward")
    other = root.parent / f"{root.name}-other"
    write(other, random_state(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPOBENCH_WEIGHTS", str(other))
        assert ImageReward(EYE).id != scorer.id


def test_a_bad_picture_costs_one_row(scorer: ImageReward, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(3), [Prompt(text) for text in TEXTS[:3]]
    want = scorer(images, prompts).value["imagereward"]
    framed = imagereward.square

    def broken(image: np.ndarray, size: int) -> torch.Tensor:
        if np.array_equal(image, images[1]):
            raise RuntimeError("the second picture")
        return framed(image, size) * (np.nan if np.array_equal(image, images[2]) else 1)

    monkeypatch.setattr(imagereward, "square", broken)
    found = scorer(images, prompts)
    assert found.value["imagereward"][0] == want[0] and np.isnan(found.value["imagereward"][1:]).all()
    assert found.reasons == {1: "RuntimeError: the second picture", 2: "the network gave a number that is not finite"}
    empty = scorer(np.zeros((1, 0, 5, 3), np.uint8), prompts[:1])
    assert np.isnan(empty.value["imagereward"]).all() and 0 in empty.reasons


@pytest.mark.parametrize("sign", [1, -1])
def test_self_test_tells_right_from_wrong(scorer: ImageReward, monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    """With a judge who sees the colour, because the published weights are not here; all rewards go up with a constant."""

    def judge(image: np.ndarray, prompt: str) -> float:
        redder = float(image[128, 128, 0]) - float(image[128, 128, 2])
        return 5 + sign * redder * (1 if "red" in prompt else -1)

    monkeypatch.setattr(scorer, "score", judge)
    if sign == 1:
        scorer.self_test()
    else:
        with pytest.raises(RuntimeError, match="prefers the wrong prompts"):
            scorer.self_test()


def test_a_wrong_file_is_refused(root: Path, state: State) -> None:
    file = root / "THUDM/ImageReward/ImageReward.pt"
    for change, said in (
        ({k: v for k, v in state.items() if k != "mlp.layers.7.bias"}, r"Missing key.*mlp\.7\.bias"),
        ({**state, "blip.text_encoder.pooler.dense.bias": torch.zeros(3)}, r"Unexpected key.*pooler"),
        ({**state, "blip.visual_encoder.cls_token": torch.zeros(1, 1, 5)}, "size mismatch"),
    ):
        torch.save(change, file)
        with pytest.raises(UserError, match=said):
            ImageReward(EYE)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not a file of weights"):
        ImageReward(EYE)


def test_what_is_not_here_is_said(root: Path) -> None:
    (root / "google-bert/bert-base-uncased/vocab.txt").write_text("a\nred\n")
    with pytest.raises(UserError, match="is not a vocabulary of BERT"):
        ImageReward(EYE)
    (root / "google-bert/bert-base-uncased/vocab.txt").write_text("\n".join(WORDS))
    (root / "THUDM/ImageReward/med_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say vocab_size"):
        ImageReward(EYE)
    (root / "THUDM/ImageReward/ImageReward.pt").unlink()
    with pytest.raises(Missing, match="THUDM/ImageReward/ImageReward.pt"):
        imagereward.make()
    with pytest.raises(UserError, match="has no variant 'v2'"):
        imagereward.make("v2")
