"""Prompts of the task ocr for real models: scene descriptions with a quoted text.

The published test prompts are read from a file that is checked byte for byte. The published train list could not be obtained, so the
train and validation prompts are composed here in the same form, a scene with one quoted phrase; phrases of the test set are left out.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import product
from random import Random

from ..bench.assets.downloads import PinnedFile
from ..bench.errors import UserError
from ..bench.spec import Prompt, Split, fold_text

TRAIN, VALIDATION = 2000, 128  # prompts

SCENES = (
    'A wooden sign at a trailhead reads "{}", moss on its edges and pines behind it in morning fog.',
    'A neon sign above a narrow bar glows "{}" in the rain, its light broken up on the wet street.',
    'A chalkboard on the pavement outside a small cafe says "{}" in careful white letters, croissants in the window behind.',
    'A white ceramic mug on an office desk is printed with "{}", papers and a laptop out of focus around it.',
    'A hand-painted banner across a village square announces "{}", people with baskets walking below it.',
    'The cover of an old hardback lying on a library table carries the title "{}" in worn gold.',
    'A street artist has sprayed "{}" across a brick wall in tall letters, a bicycle leaning against it.',
    'The departure board of a quiet railway station shows "{}", one traveller looking up at it.',
    'A birthday cake on a kitchen counter is iced with "{}", candles just blown out.',
    'A black T-shirt on a market stall bears "{}" across the chest in plain white print.',
    'A lighthouse keeper\'s logbook lies open, "{}" written large on the page in blue ink.',
    'The glass door of a bookshop carries a sticker that says "{}", shelves and warm lamps inside.',
    'A delivery van parked by the harbour has "{}" lettered on its side, gulls on the quay.',
    'A museum label beside a bronze figure reads "{}", a marble floor and tall windows beyond.',
    'A poster on a classroom wall says "{}" above drawings of planets, small chairs in rows in front.',
    'A metal plaque on a garden gate is engraved with "{}", roses climbing over the fence.',
)
FIRST = (
    "Open Fresh Quiet Golden Silver Northern Southern Early Late Little Grand Secret Wild Gentle Bright Hidden Lucky Royal Simple Modern "
    "Rustic Happy Winter Summer Autumn Spring Midnight Morning Evening Sunday"
).split()
SECOND = (
    "Harbor Garden Bakery Market Coffee Orchard Library Theatre Gallery Kitchen Workshop Station Meadow Lantern Compass Festival Museum "
    "Journey Voyage Concert Harvest Forest River Valley Island Castle Bridge Tower Planet Rocket Tiger Falcon Dolphin Badger Sparrow "
    "Ticket Parade Picnic Lesson Record"
).split()
LAST = ("", "Club", "Today", "Room 12", "Since 1987", "No Entry", "Half Price", "Ahead")


def published(file: PinnedFile) -> list[Prompt]:
    """The prompts of the published test file; UserError where it cannot be obtained or has other content."""
    try:
        raw = file.read()
    except UserError as error:
        raise UserError(f"the test prompts of the task ocr, domain 'open': {error}") from None
    return [_prompt(line) for line in raw.decode("utf-8").split("\n")]


def compose(test: Sequence[Prompt]) -> dict[Split, list[Prompt]]:
    """The train and validation prompts: each with another text, and none with a text of a test prompt."""
    phrases = _phrases_beside(test)
    phrases.sort(key=lambda phrase: sha256(phrase.encode("ascii")).digest())
    prompts = [_prompt(SCENES[i % len(SCENES)].format(phrase)) for i, phrase in enumerate(phrases)]
    return {"validation": prompts[:VALIDATION], "train": prompts[VALIDATION : VALIDATION + TRAIN]}


def fresh_scenes(count: int, seed: int, known: Sequence[Prompt]) -> list[Prompt]:
    """Scenes with texts that no known prompt has, drawn by a secret seed; as many as there are where these are fewer than count."""
    phrases, draw = _phrases_beside(known), Random(seed)
    chosen = draw.sample(phrases, min(count, len(phrases)))
    return [_prompt(draw.choice(SCENES).format(phrase)) for phrase in chosen]


def _phrases_beside(known: Sequence[Prompt]) -> list[str]:
    """The phrases that are the text of none of these prompts."""
    texts = {fold_text(prompt.meta["target"]) for prompt in known}
    phrases = [" ".join(filter(None, words)) for words in product(FIRST, SECOND, LAST)]
    return [phrase for phrase in phrases if fold_text(phrase) not in texts]


def _prompt(text: str) -> Prompt:
    """The target stands in the prompt's only pair of straight double quotes."""
    _, target, _ = text.split('"')
    return Prompt(text, {"target": target})
