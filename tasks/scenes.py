"""Prompts that several tasks share: words and counted shapes of the embedded model, and scenes in four styles for real models.

`glyph_prompts` are all kinds of prompt that the embedded 64x32 model knows; the split follows from the prompt alone.
`styled_scenes` are composed from a small grammar, because no list of train prompts for the HPSv2 benchmark is available at a fixed address
and hash: a subject, a place and a style, every combination of subject and place in one split only.
"""

from collections.abc import Collection, Sequence
from functools import cache
from hashlib import sha256
from itertools import product

from ..bench.assets.glyphs import COUNTS, SHAPE_COLOURS, SHAPES, shapes_prompt, split_of
from ..bench.assets.words import WORD_LIST
from ..bench.spec import Prompt, Split, fold_text
from .ocr import read_words, word_to_prompt

EVALUATION_WORDS = 45  # of the test and of the validation split; with 15 shapes prompts each, 60 a split
SHAPES_SPLIT: tuple[Split, ...] = ("train", "test", "validation")  # of (kind + colour + count) % 3
WORD, SHAPE = "word", "shape"  # strata

STYLES = ("anime", "concept-art", "paintings", "photo")  # of the HPSv2 benchmark, arXiv 2306.09341
TRAIN, VALIDATION = 2000, 128  # composed prompts, the styles in equal parts

SUBJECTS = (
    "a lighthouse keeper with a brass lamp|two children flying a paper kite|an old tram with fogged windows|a red fox asleep|"
    "a violinist in a green coat|a baker carrying warm loaves|a wooden sailing boat|a girl reading a large book|"
    "a grey horse drinking|an astronaut holding a sunflower|a row of crooked houses|a black cat on a stack of letters|"
    "a clockmaker at his bench|a stone bridge covered in ivy|a white owl spreading its wings|a cyclist in the rain|"
    "a market stall of oranges|a retired boxer feeding pigeons|a glass greenhouse|a gardener with a blue watering can|"
    "a small robot made of copper|three swans in a line|a diver with an old helmet|a woman mending a net|"
    "an empty rocking chair|a mountain hut with smoke from its chimney|a fisherman and his dog|a chess player deep in thought|"
    "a dragon curled around a tower|a hot air balloon with yellow stripes|a train conductor checking his watch|a sleeping tiger|"
    "a windmill with torn sails|a dancer tying her shoes|a knight without a helmet|a bowl of cherries|"
    "a snow leopard on a ledge|a street musician with an accordion|a caravan painted with stars|a postman on a bicycle"
).split("|")
PLACES = (
    "at the edge of a frozen lake|in a narrow street after rain|under a blossoming cherry tree|on a cliff above the sea at dusk|"
    "in a field of tall wheat|beneath a sky full of stars|in an abandoned railway station|beside a waterfall in the jungle|"
    "on a rooftop at sunrise|in a library with spiral stairs|in the ruins of a temple|at a harbour in the morning fog|"
    "in a desert with a single tree|during the first snow of winter|on a crowded square at noon|in a valley of lavender|"
    "by the light of a campfire|inside a cathedral of ice|on a wooden pier at low tide|in a garden of giant mushrooms|"
    "on the steps of an opera house|under a rainbow after a storm|in a canyon of red stone|on an island in the clouds|"
    "at a night market with paper lanterns|in an autumn forest|at the bottom of a clear lake|in a quiet kitchen|"
    "on a winding mountain road|in front of a blue door|among dunes by the sea|in a courtyard with a fountain"
).split("|")
FORMS = {
    "anime": "{subject} {place}, anime key visual, clean line art, soft cel shading",
    "concept-art": "concept art of {subject} {place}, dramatic light, wide composition",
    "paintings": "an oil painting of {subject} {place}, visible brush strokes",
    "photo": "a photo of {subject} {place}, natural light, 35 mm",
}


@cache
def glyph_prompts(split: Split) -> tuple[Prompt, ...]:
    """Words (their target among the facts) and shapes prompts of a split; stratum `word` or `shape`.

    The spelling of a word decides its split, as in the task ocr; the 45 shapes prompts form a Latin square, so that every split holds
    every kind, every colour and every count. All train words; of the others the first 45 by digest.
    """
    words = [word for word in read_words(WORD_LIST) if split_of(word) == split]
    word_prompts = [word_to_prompt(word) for word in (words if split == "train" else words[:EVALUATION_WORDS])]
    shapes = [
        shapes_prompt(kind, count, colour)
        for (i, kind), (j, colour), count in product(enumerate(SHAPES), enumerate(SHAPE_COLOURS), COUNTS)
        if SHAPES_SPLIT[(i + j + count) % 3] == split
    ]
    return (
        *(Prompt(prompt.text, prompt.meta, stratum=WORD) for prompt in word_prompts),
        *(Prompt(text, stratum=SHAPE) for text in shapes),
    )


def styled_scenes(excluded: Collection[str]) -> dict[Split, list[Prompt]]:
    """The composed train and validation prompts, stratum = style; none of them folds to one of `excluded` (folded texts).

    Pairs of subject and place stand in the order of their digests; the first go to validation in one style each, the others to train
    in two.
    """
    pairs = sorted(product(SUBJECTS, PLACES), key=lambda pair: sha256(" ".join(pair).encode("ascii")).digest())
    first, rest = pairs[:VALIDATION], pairs[VALIDATION:]
    validation = [_scene(pair, i) for i, pair in enumerate(first)]
    train = [_scene(pair, i + turn) for turn in (0, 2) for i, pair in enumerate(rest)]
    return {"validation": _free(validation, excluded), "train": _free(train, excluded)[:TRAIN]}


def _scene(pair: tuple[str, str], turn: int) -> Prompt:
    style = STYLES[turn % len(STYLES)]
    return Prompt(FORMS[style].format(subject=pair[0], place=pair[1]), stratum=style)


def _free(prompts: Sequence[Prompt], excluded: Collection[str]) -> list[Prompt]:
    return [prompt for prompt in prompts if fold_text(prompt.text) not in excluded]
