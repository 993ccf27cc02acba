"""GenEval's rule and Flow-GRPO's credit: worked answers, and what must hold for any boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Prompt
from gpobench.rewards import geneval_rules as rules
from gpobench.rewards.detectors import Detection

B = (200.0, 200.0, 300.0, 300.0)
# The published rule's answers, worked out from its text.
POSITIONS: list[tuple[tuple[float, ...], set[str]]] = [
    ((0, 200, 100, 300), {"left of"}),
    ((400, 200, 500, 300), {"right of"}),
    ((200, 0, 300, 100), {"above"}),
    ((200, 400, 300, 500), {"below"}),
    ((0, 0, 100, 100), {"above", "left of"}),
    ((210, 200, 310, 300), set()),
    ((220, 200, 320, 300), set()),
    ((230, 200, 330, 300), set()),
    ((240, 200, 340, 300), set()),
    ((245, 200, 345, 300), {"right of"}),
    ((260, 230, 360, 330), {"right of"}),
    ((100, 50, 200, 150), {"above"}),
]


def seen(label: str, score: float = 0.95, box: Sequence[float] = (0, 0, 10, 10)) -> Detection:
    return Detection(label, score, (box[0], box[1], box[2], box[3]))


def facts(tag: str, *include: Mapping[str, Any], too_many: int = 0) -> rules.GenEvalTarget:
    exclude = [{"class": include[0]["class"], "count": too_many}] if too_many else []
    return rules.target_of(Prompt("a prompt", {"tag": tag, "include": list(include), "exclude": exclude}))


def no_colour(thing: Detection) -> str:
    raise AssertionError(f"nobody asked for the colour of {thing.label}")


def judged(
    asked: rules.GenEvalTarget, detections: Sequence[Detection], colour: rules.Colour = no_colour, bug: bool = False
) -> tuple[bool, list[float], bool]:
    found = rules.counted(detections, asked.tag)
    correct, why = rules.official(asked, found, colour)
    assert correct != bool(why)
    credits = rules.partial(asked, found, colour, legacy_position_bug=bug)
    return correct, credits, rules.strict(asked, found, colour)


# Position


@pytest.mark.parametrize(("a", "sides"), POSITIONS)
def test_positions(a: tuple[float, float, float, float], sides: set[str]) -> None:
    assert rules.relative_position(a, B) == sides


@pytest.mark.parametrize("side", [10.0, 100.0, 333.0])
def test_equal_squares_count_beyond_four_tenths_of_their_side(side: float) -> None:
    """(0.4 s - 0.1 * 2 s) / 0.4 s is the 0.5 that must be exceeded."""
    square = (0.0, 0.0, side, side)
    for share, holds in ((0.39, False), (0.41, True)):
        a = (share * side, 0.0, (1 + share) * side, side)
        assert (rules.relative_position(a, square) == {"right of"}) is holds


def test_the_same_box_is_on_no_side() -> None:
    assert rules.relative_position(B, B) == frozenset()


boxes = st.tuples(*[st.integers(0, 400)] * 2, *[st.integers(1, 200)] * 2).map(
    lambda v: (float(v[0]), float(v[1]), float(v[0] + v[2]), float(v[1] + v[3]))
)


@given(boxes, boxes, st.integers(-500, 500), st.integers(-500, 500))
def test_moving_both_boxes_keeps_the_sides_and_swapping_them_mirrors_them(
    a: rules.Box, b: rules.Box, dx: int, dy: int
) -> None:
    sides = rules.relative_position(a, b)
    moved = [(x1 + dx, y1 + dy, x2 + dx, y2 + dy) for x1, y1, x2, y2 in (a, b)]
    assert rules.relative_position(moved[0], moved[1]) == sides
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert rules.relative_position(b, a) == {mirror[side] for side in sides}
    assert not {"left of", "right of"} <= sides and not {"above", "below"} <= sides


# Counting


def test_constants_are_the_published_ones() -> None:
    assert rules.Rule(0.3, 0.9, 16, 1.0, 0.1) == rules.OFFICIAL and str(rules.OFFICIAL) == "0.3-0.9-16-1-0.1"


def test_iou_counts_the_last_pixel() -> None:
    assert rules.iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert rules.iou((0, 0, 9, 9), (9, 0, 18, 9)) == 10 / 190  # they share one column
    assert rules.iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert rules.iou((0, 0, 9, 9), (0, 5, 9, 14)) == 50 / 150
    assert rules.iou((5, 5, 3, 3), (5, 5, 3, 3)) == 0  # nothing in neither


def test_overlaps_are_dropped_only_where_asked_for() -> None:
    detections = [seen("dog", 0.99), seen("dog", 0.95, (0, 0, 10, 9)), seen("dog", 0.92, (50, 50, 60, 60))]
    assert len(rules.counted(detections, "counting")["dog"]) == 3
    kept = rules.counted(detections, "counting", replace(rules.OFFICIAL, max_overlap=0.5))["dog"]
    assert [d.score for d in kept] == [0.99, 0.92]


def test_thresholds_are_strict_and_of_the_tag() -> None:
    detections = [seen("dog", score) for score in (0.3, 0.31, 0.9, 0.91)]
    assert len(rules.counted(detections, "counting")["dog"]) == 1
    assert len(rules.counted(detections, "colors")["dog"]) == 3


def test_at_most_sixteen_of_a_class() -> None:
    detections = [seen("dog", 0.9 + i / 1000) for i in range(1, 21)] + [seen("cat", 0.99)]
    found = rules.counted(detections, "counting")
    assert [d.score for d in found["dog"]] == sorted((d.score for d in detections[:20]), reverse=True)[:16]
    assert len(found["cat"]) == 1


def test_more_than_asked_for_is_wrong_only_where_a_clause_excludes_it() -> None:
    one = {"class": "bench", "count": 1}
    assert judged(facts("single_object", one), [seen("bench", 0.5)] * 5) == (True, [-3.0], False)
    two = facts("counting", {"class": "clock", "count": 2}, too_many=3)
    assert [judged(two, [seen("clock")] * n)[0] for n in range(5)] == [False, False, True, False, False]


@given(st.integers(1, 4), st.lists(st.sampled_from([0.2, 0.5, 0.91, 0.97]), max_size=20))
def test_counting_is_correct_for_exactly_so_many(n: int, scores: list[float]) -> None:
    asked = facts("counting", {"class": "cup", "count": n}, too_many=n + 1)
    correct, credits, strict = judged(asked, [seen("cup", score) for score in scores])
    f = min(sum(score > 0.9 for score in scores), 16)
    assert correct == strict == (f == n) and credits == [pytest.approx(1 - abs(n - f) / n)]


# The credit

AT = {"left": (0, 200, 100, 300), "middle": B, "right": (400, 200, 500, 300)}
LEFT = ({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})
TWO = ({"class": "dog", "count": 1}, {"class": "cat", "count": 1})
RED = {"class": "car", "count": 1, "color": "red"}
CREDITS: list[tuple[str, rules.GenEvalTarget, list[Detection], str, list[float]]] = [
    ("three of three", facts("counting", {"class": "cup", "count": 3}, too_many=4), [seen("cup")] * 3, "", [1]),
    ("two of three", facts("counting", {"class": "cup", "count": 3}, too_many=4), [seen("cup")] * 2, "", [2 / 3]),
    ("four of three", facts("counting", {"class": "cup", "count": 3}, too_many=4), [seen("cup")] * 4, "", [2 / 3]),
    ("five of two", facts("counting", {"class": "cup", "count": 2}, too_many=3), [seen("cup")] * 5, "", [-0.5]),
    ("sixteen of two", facts("counting", {"class": "cup", "count": 2}, too_many=3), [seen("cup")] * 16, "", [-6]),
    ("both", facts("two_object", *TWO), [seen("dog"), seen("cat")], "", [1, 1]),
    ("one missing", facts("two_object", *TWO), [seen("dog")], "", [1, 0]),
    ("right colour", facts("colors", RED), [seen("car")], "red", [1, 1]),
    ("wrong colour", facts("colors", RED), [seen("car")], "blue", [1, 0]),
    ("two cars", facts("colors", RED), [seen("car")] * 2, "red", [0, 0]),
    (
        "all right",
        facts("position", *LEFT),
        [seen("cat", box=AT["left"]), seen("dog", box=AT["middle"])],
        "",
        [1, 1, 1],
    ),
    ("no reference", facts("position", *LEFT), [seen("cat", box=AT["left"])], "", [0, 1, 0]),
]


@pytest.mark.parametrize(("case", "asked", "detections", "colour", "credits"), CREDITS, ids=[c[0] for c in CREDITS])
@pytest.mark.parametrize("bug", [False, True])
def test_credits(
    case: str, asked: rules.GenEvalTarget, detections: list[Detection], colour: str, credits: list[float], bug: bool
) -> None:
    correct, paid, strict = judged(asked, detections, lambda thing: colour, bug)
    assert paid == pytest.approx(credits), case
    assert strict == (np.mean(paid) == 1) and (correct or not strict)


def test_a_wrong_relation_earns_the_published_bug_only_where_asked_for() -> None:
    astray = [seen("cat", box=AT["right"]), seen("dog", box=AT["middle"])]
    asked = facts("position", *LEFT)
    assert judged(asked, astray, bug=True)[1] == [1, 1, 0, 1]  # mean 0.75
    assert judged(asked, astray) == (False, [1, 1, 0], False)


names = st.sampled_from(["dog", "cat", "car"])
clauses = st.lists(
    st.builds(
        lambda name, n, colour, relation: {
            "class": name,
            "count": n,
            **({"color": colour} if colour else {}),
            **({"position": [relation, 0]} if relation else {}),
        },
        names,
        st.integers(1, 3),
        st.sampled_from(["", "", "red", "blue"]),
        st.sampled_from(["", "", *rules.RELATIONS]),
    ),
    min_size=1,
    max_size=3,
).map(lambda made: [{k: v for k, v in made[0].items() if k != "position"}, *made[1:]])
scenes = st.lists(
    st.builds(seen, names, st.floats(0.01, 1.0), boxes), max_size=12, unique_by=(lambda d: d.score, lambda d: d.box)
)


def box_colour(thing: Detection) -> str:
    """Any fixed colour of an object will do for the laws."""
    return "red" if thing.box[0] % 2 else "blue"


@given(clauses, scenes, st.sampled_from(["counting", "colors"]), st.randoms(use_true_random=False), st.booleans())
def test_laws_of_all_three_verdicts(
    include: list[dict[str, Any]], scene: list[Detection], tag: str, random: Any, bug: bool
) -> None:
    asked = facts(tag, *include, too_many=4)
    correct, credits, strict = judged(asked, scene, box_colour, bug)
    assert all(credit <= 1 for credit in credits) and math.isfinite(np.mean(credits))
    assert (np.mean(credits) == 1) == strict
    excluded = len(rules.counted(scene, tag).get(str(include[0]["class"]), ())) >= 4
    assert correct or excluded or not strict

    mixed = list(scene)
    random.shuffle(mixed)
    assert judged(asked, mixed, box_colour, bug) == (correct, credits, strict)
    faint = [*scene, seen("dog", 0.3), seen("cat", 0.1), seen("tree", 1.0)]
    assert judged(asked, faint, box_colour, bug) == (correct, credits, strict)


@given(scenes, st.randoms(use_true_random=False))
def test_equal_scores_are_ranked_by_place_not_by_order(scene: list[Detection], random: Any) -> None:
    level = [d._replace(score=0.95) for d in scene]
    mixed = list(level)
    random.shuffle(mixed)
    assert rules.counted(level, "colors") == rules.counted(mixed, "colors")


@given(clauses, scenes)
def test_colours_are_asked_of_nothing_but_what_was_announced(
    include: list[dict[str, Any]], scene: list[Detection]
) -> None:
    """A scorer classifies `to_colour` once; no rule may look at another object."""
    asked = facts("colors", *include)
    found = rules.counted(scene, "colors")
    ready = {id(d) for d in rules.to_colour(asked, found)}

    def colour(thing: Detection) -> str:
        assert id(thing) in ready
        return box_colour(thing)

    rules.official(asked, found, colour)
    rules.partial(asked, found, colour)
    rules.describe(asked, found, colour)


# Colours and positions together, as published


def test_the_best_scored_instance_decides() -> None:
    """A red car that is seen less well than a blue one does not help; nor does it hurt."""
    cars = [seen("car", 0.8, (0, 0, 10, 10)), seen("car", 0.7, (1, 0, 10, 10))]
    asked = facts("colors", RED)
    for best, correct in (("blue", False), ("red", True)):
        other = "red" if best == "blue" else "blue"
        assert judged(asked, cars, lambda d, best=best, other=other: best if d.box[0] == 0 else other)[0] is correct


def test_a_clause_that_failed_is_no_target() -> None:
    correct, why = rules.official(facts("position", *LEFT), rules.counted([seen("cat")], "position"), no_colour)
    assert not correct and "expected at least 1 dog, found 0" in why and "no target for cat to be left of" in why


def test_what_was_counted_is_told() -> None:
    asked = facts("colors", {"class": "circle", "count": 2, "color": "red"})
    found = rules.counted([seen("circle", 0.9 - i / 100, (i, 0, 9, 9)) for i in range(3)], "colors")
    assert rules.describe(asked, found, box_colour) == "3 circle (1 red)"
    assert rules.describe(facts("two_object", *TWO), {}, no_colour) == "0 dog, 0 cat"


# Facts


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "'a dog' has no tag and no include"),
        ({"tag": "counting"}, "has no include"),
        ({"tag": "colours", "include": [RED]}, "did you mean 'colors'"),
        ({"tag": "counting", "include": [RED]}, "has no exclude"),
        ({"tag": "colors", "include": ["dog"]}, "is no clause"),
        ({"tag": "colors", "include": [{"class": "dog"}]}, "is no clause"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}]}, "counts from 1"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "oranje"}]}, "did you mean 'orange'"),
        ({"tag": "position", "include": [TWO[0], {**TWO[1], "position": ["over", 0]}]}, "unknown relation"),
        ({"tag": "position", "include": [{**TWO[1], "position": ["above", 0]}]}, "no earlier one"),
        ({"tag": "position", "include": [TWO[0], {**TWO[1], "position": ["above"]}]}, "is no clause"),
    ],
)
def test_a_prompt_without_its_facts_is_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rules.target_of(Prompt("a dog", meta))
    assert "a dog" in str(error.value) and "\n" not in str(error.value)


@given(clauses)
def test_facts_survive_reading(include: list[dict[str, Any]]) -> None:
    assume(len(include) > 1)
    read = rules.target_of(Prompt("x", {"tag": "colors", "include": include})).include
    for clause, given_clause in zip(read, include, strict=True):
        assert (clause.name, clause.count) == (given_clause["class"], given_clause["count"])
        assert clause.color == given_clause.get("color", "")
        assert [clause.relation, clause.target] == given_clause.get("position", ["", 0])
