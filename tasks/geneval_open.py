"""GenEval's prompt grammar, written and parsed, and its splits for real models.

The published benchmark (arXiv 2310.11513; djghosh13/geneval at af4902f, MIT) is 553 prompts in six tags over COCO's 80 classes, three
of them renamed. Both files are downloaded from their publisher and checked byte for byte. The grammar is kept with its faults, because
they are part of the published strings: plurals are naive (`three benchs`, `four skises`). `write` makes a sentence of clauses, `parse`
is its inverse, and the train and validation prompts are those that `write` can make and the benchmark does not ask for.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import count, islice, permutations, product
from typing import Any

from ..bench import registry
from ..bench.assets.downloads import PinnedFile
from ..bench.assets.record_files import fact
from ..bench.errors import UserError
from ..bench.spec import Prompt, Split, fold_text

Clause = Mapping[str, Any]  # GenEval's: class, count, perhaps color or position
Include = Sequence[Clause]

_AT = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f"
METADATA = PinnedFile(
    "geneval/prompts/evaluation_metadata.jsonl",
    f"{_AT}/prompts/evaluation_metadata.jsonl",
    "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    records=553,
)
OBJECTS = PinnedFile(
    "geneval/evaluation/object_names.txt",
    f"{_AT}/evaluation/object_names.txt",
    "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
    records=80,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}  # the same relation from the other object's side
NEVER_COLOURED = "person"
# Weight of a tag in Flow-GRPO's train list (yifan123/flow_grpo at ac4c86e), which could not be obtained.
WEIGHTS = {"position": 0.7, "counting": 0.5, "color_attr": 0.3, "colors": 0.1, "two_object": 0.1}


# Grammar


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def write(tag: str, include: Include) -> str:
    """The published sentence of a tag and its clauses; UserError where the grammar cannot express them."""
    names = [str(clause["class"]) for clause in include]
    if tag == "single_object":
        words = _article(names[0])
    elif tag == "two_object":
        words = f"{_article(names[0])} and {_article(names[1])}"
    elif tag == "counting":
        if include[0]["count"] not in NUMBERS:
            raise UserError(f"GenEval counts {' or '.join(NUMBERS.values())}, not {include[0]['count']} {names[0]}")
        words = f"{NUMBERS[include[0]['count']]} {_plural(names[0])}"
    elif tag == "colors":
        words = _article(f"{include[0]['color']} {names[0]}")
    elif tag == "position":  # the object that is placed is the second clause, the one it is placed by the first
        words = f"{_article(names[1])} {include[1]['position'][0]} {_article(names[0])}"
    elif tag == "color_attr":
        words = " and ".join(_article(f"{clause['color']} {clause['class']}") for clause in include)
    else:
        raise registry.unknown("GenEval tag", tag, TAGS)
    return f"a photo of {words}"


def facts(tag: str, include: Include) -> dict[str, Any]:
    """The facts that the scorer needs; under the tag counting, one object more is excluded."""
    values: dict[str, Any] = {"tag": tag, "include": [dict(clause) for clause in include]}
    if tag == "counting":
        values["exclude"] = [{"class": clause["class"], "count": clause["count"] + 1} for clause in include]
    return values


def compose(tag: str, include: Include) -> Prompt:
    """The prompt of a tag and its clauses."""
    return Prompt(write(tag, include), facts(tag, include), stratum=tag)


def from_row(row: Mapping[str, Any]) -> Prompt:
    """A prompt from a row of metadata; `to_row` is its inverse."""
    return Prompt(row["prompt"], {key: row[key] for key in row if key != "prompt"}, stratum=row["tag"])


def to_row(prompt: Prompt) -> dict[str, Any]:
    """A row of metadata, as the published file holds it."""
    return {**prompt.meta, "prompt": prompt.text}


def parse(text: str, objects: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """The tag and the clauses of a sentence, the inverse of `write`; UserError naming the unknown word, with the nearest valid one.

    Case, a full stop and repeated spaces do not matter, and `a` may stand for `an`.
    """
    clean = " ".join(text.lower().split()).rstrip(".")
    match = re.fullmatch(r"a photo of (?:(?P<one>an? .+)|(?P<number>\S+) (?P<many>.+))", clean)
    if match is None:
        raise UserError(f"not a GenEval prompt, which begins with 'a photo of' and names an object: {text!r}")
    if match["many"]:
        numbers = {word: n for n, word in NUMBERS.items()}
        if match["number"] not in numbers:
            raise registry.unknown(f"number in {text!r}:", match["number"], (*numbers, "a", "an"))
        singular = {_plural(name): name for name in objects}
        if match["many"] not in singular:
            raise registry.unknown(f"objects in {text!r}:", match["many"], singular)
        return "counting", [{"class": singular[match["many"]], "count": numbers[match["number"]]}]
    for relation in RELATIONS:
        placed, between, by = match["one"].partition(f" {relation} ")
        if between:
            this, that = _object(placed, objects, text), _object(by, objects, text)
            if "color" in this or "color" in that:
                raise UserError(f"GenEval has no colours in a prompt about places: {text!r}")
            return "position", [that, {**this, "position": [relation, 0]}]
    clauses = [_object(part, objects, text) for part in match["one"].split(" and ")]
    coloured = sum("color" in clause for clause in clauses)
    if len(clauses) > 2 or coloured not in (0, len(clauses)):
        raise UserError(f"GenEval asks for one object or two, with a colour for each or for none: {text!r}")
    tags = {(1, 0): "single_object", (1, 1): "colors", (2, 0): "two_object", (2, 2): "color_attr"}
    return tags[len(clauses), coloured], clauses


def _object(words: str, objects: Sequence[str], text: str) -> dict[str, Any]:
    """`a dog` or `an orange car` -> a clause. A class named like a colour is a colour only before another class."""
    article, _, name = words.partition(" ")
    if article not in ("a", "an") or not name:
        raise UserError(f"{words!r} in {text!r} should be an article and an object, as in 'a dog' or 'an orange car'")
    if name in objects:
        return {"class": name, "count": 1}
    colour, _, rest = name.partition(" ")
    if rest in objects:
        if colour not in COLOURS:
            raise registry.unknown(f"colour in {text!r}:", colour, COLOURS)
        return {"class": rest, "count": 1, "color": colour}
    raise registry.unknown(f"object in {text!r}:", rest if colour in COLOURS and rest else name, objects)


def read(text: str, row_facts: Mapping[str, Any], objects: Callable[[], Sequence[str]]) -> Prompt:
    """A user's own prompt: by its facts `tag` and `include` (or `exclude`) where the row has them, else by the grammar.

    Raises UserError on facts that are incomplete or contradict the text: none is dropped.
    """
    stated = {key: fact(row_facts, key) for key in ("tag", "include", "exclude")}
    if not stated["include"] and not stated["exclude"]:
        tag, include = parse(text, objects())
        if stated["tag"] not in (None, "", tag):
            raise UserError(f"the fact `tag` of {text!r} is {stated['tag']!r}, but the text is one of {tag!r}")
        return Prompt(text, facts(tag, include), stratum=tag)
    if not stated["include"]:
        raise UserError(f"the facts of {text!r} have an `exclude` but no `include`, which GenEval's rule needs")
    if stated["tag"] not in TAGS:
        raise registry.unknown(f"GenEval tag of {text!r}:", str(stated["tag"] or ""), TAGS)
    clauses = {key: _clauses(text, key, stated[key]) for key in ("include", "exclude") if stated[key]}
    tag = str(stated["tag"])
    return Prompt(text, {**facts(tag, clauses["include"]), "tag": tag, **clauses}, stratum=tag)


def _clauses(text: str, key: str, value: Any) -> list[dict[str, Any]]:
    """The clauses of a user's own facts, which a table holds as JSON; UserError on clauses that GenEval's rule cannot read."""
    wrong = lambda why: UserError(f"the fact `{key}` of {text!r} {why}")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise wrong(f"is no JSON: {error}") from None
    if not isinstance(value, Sequence) or not all(isinstance(clause, Mapping) for clause in value):  # pyright: ignore
        raise wrong('is a list of clauses, such as [{"class": "dog", "count": 2}]')
    clauses = [dict(clause) for clause in value]  # pyright: ignore
    for i, clause in enumerate(clauses):
        count, colour, place = (clause.get(name) for name in ("count", "color", "position"))
        if not isinstance(clause.get("class"), str) or not clause["class"]:
            raise wrong(f"names no class in its clause {i + 1}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise wrong(f"counts {count!r} {clause['class']}, not 1 or more")
        if colour is not None and colour not in COLOURS:
            raise registry.unknown(f"colour in the fact `{key}` of {text!r}:", str(colour), COLOURS)
        if place is not None:
            if key == "exclude":
                raise wrong("places an object, which only `include` may")
            if not isinstance(place, Sequence) or isinstance(place, str) or len(place) != 2:  # pyright: ignore
                raise wrong('places an object as ["left of", 0]: a relation and which clause it is placed by')
            if place[0] not in RELATIONS:
                raise registry.unknown(f"relation in the fact `{key}` of {text!r}:", str(place[0]), RELATIONS)
            if place[1] not in range(i):
                raise wrong(
                    f"places its clause {i + 1} by the clause {place[1]!r}, which is none before it (the first is 0)"
                )
    return clauses


def asks_for(prompt: Prompt) -> tuple[Any, ...]:
    """Key of what a prompt asks for; the order of two objects, and which of them is placed by the other, make no difference."""
    include: Include = prompt.meta["include"]
    things = [(str(c["class"]), int(c["count"]), str(c.get("color", ""))) for c in include]
    for i, clause in enumerate(include):
        if clause.get("position"):
            relation, j = clause["position"]
            ends = (things[i], things[j]) if relation not in MIRRORED else (things[j], things[i])
            return (MIRRORED.get(relation, relation), *ends)
    return tuple(sorted(things))


# Splits


@cache
def published(data: str) -> list[Prompt]:
    """The 553 prompts of the benchmark, in its order. data: GPOBENCH_DATA, which decides where the file is found."""
    rows = [from_row(json.loads(line)) for line in METADATA.read().decode("utf-8").splitlines()]
    if len(rows) != METADATA.records:
        raise UserError(f"{METADATA.path} holds {len(rows)} prompts, expected {METADATA.records}")
    return rows


@cache
def objects(data: str) -> tuple[str, ...]:
    """The 80 class names, in the order of the detector's classes."""
    names = tuple(OBJECTS.read().decode("utf-8").splitlines())
    if len(names) != OBJECTS.records:
        raise UserError(f"{OBJECTS.path} holds {len(names)} names, expected {OBJECTS.records}")
    return names


def _includes(tag: str, names: Sequence[str]) -> tuple[Sequence[tuple[Any, ...]], Callable[..., Include]]:
    """Every choice of words of a tag, and the function that makes clauses of one."""
    coloured = [name for name in names if name != NEVER_COLOURED]
    if tag == "single_object":
        return list(product(names)), lambda a: [_one(a)]
    if tag == "two_object":
        return list(permutations(names, 2)), lambda a, b: [_one(a), _one(b)]
    if tag == "counting":
        return list(product(names, NUMBERS)), lambda a, n: [{"class": a, "count": n}]
    if tag == "colors":
        return list(product(coloured, COLOURS)), lambda a, c: [_one(a, color=c)]
    if tag == "position":
        pairs = list(product(permutations(names, 2), RELATIONS))
        return pairs, lambda ab, r: [_one(ab[0]), _one(ab[1], position=[r, 0])]
    if tag == "color_attr":
        pairs = list(product(permutations(coloured, 2), permutations(COLOURS, 2)))
        return pairs, lambda ab, cd: [_one(ab[0], color=cd[0]), _one(ab[1], color=cd[1])]
    raise registry.unknown("GenEval tag", tag, TAGS)


def _one(name: str, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": 1, **more}


def sentences(tag: str, names: Sequence[str], seed: int = 0) -> Iterator[Prompt]:
    """Every prompt of a tag once, in the order of a stream of hashes, which does not depend on a library's random generator."""
    choices, include = _includes(tag, names)
    drawn: set[int] = set()
    for i in count():
        if len(drawn) == len(choices):
            return
        place = int.from_bytes(sha256(f"{seed}/{tag}/{i}".encode()).digest()[:8], "big") % len(choices)
        if place not in drawn:
            drawn.add(place)
            yield compose(tag, include(*choices[place]))


@dataclass(frozen=True)
class Beside:
    """Test for prompts that none of a set asks for, up to the order of objects, case and punctuation."""

    target_keys: frozenset[tuple[Any, ...]]
    texts: frozenset[str]

    def free(self, prompt: Prompt) -> bool:
        """True where the prompt differs from each of the set."""
        return asks_for(prompt) not in self.target_keys and fold_text(prompt.text) not in self.texts


def beside(prompts: Sequence[Prompt]) -> Beside:
    """The test that keeps these prompts out of another split."""
    return Beside(frozenset(map(asks_for, prompts)), frozenset(fold_text(prompt.text) for prompt in prompts))


@cache
def splits(train: int, validation: int, seed: int, data: str) -> dict[Split, list[Prompt]]:
    """Prompts that are not in the benchmark: `validation` prompts of each trained tag, then `train` prompts by WEIGHTS from the rest.

    A tag with fewer prompts than its share repeats them evenly (counting has 240 - 80 = 160 beside the benchmark, colors 790 - 94 = 696).
    """
    test, names, share = published(data), objects(data), shares(train)
    left = {tag: filter(beside(test).free, sentences(tag, names, seed)) for tag in WEIGHTS}
    validation_prompts = [prompt for tag in WEIGHTS for prompt in islice(left[tag], validation)]
    unused = beside(validation_prompts)
    train_prompts: list[Prompt] = []
    for tag in WEIGHTS:
        pool = list(islice(filter(unused.free, left[tag]), share[tag]))
        if not pool:
            raise UserError(f"geneval: {validation} validation prompts a tag leave no {tag} prompt to train on")
        train_prompts += [pool[i % len(pool)] for i in range(share[tag])]
    return {"train": train_prompts, "validation": validation_prompts}


def shares(train: int) -> dict[str, int]:
    """Number of train prompts of each tag: by WEIGHTS; the remainder of the rounding goes to the largest."""
    whole = sum(WEIGHTS.values())
    share = {tag: int(train * weight / whole) for tag, weight in WEIGHTS.items()}
    share["position"] += train - sum(share.values())
    return share
