"""GenEval's rule: checks class, count, colour and position of detected objects against what a prompt asks for.

Two rules over the same detections, both pure functions. `official` is GenEval's (arXiv 2310.11513; evaluation/evaluate_images.py of
djghosh13/geneval at af4902f). `partial` and `strict` are the training reward of Flow-GRPO (reward_server/gen_eval.py of
yifan123/reward-server at 92ac29f), which gives credit for near misses. Where they differ: the official rule uses the first `count`
detections and penalises more than asked for only in an `exclude` clause; the training reward requires the exact number everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..bench import registry
from ..bench.errors import UserError
from ..bench.spec import Prompt
from .detectors import Detection

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Box = tuple[float, float, float, float]  # x1, y1, x2, y2; y points down
DetectionsByClass = Mapping[str, Sequence[Detection]]  # class -> its detections that count, best first
Colour = Callable[[Detection], str]  # classifies the colour of an object, which no rule decides


# What is asked for


@dataclass(frozen=True)
class Clause:
    """One clause of a prompt: a class, its count, and the colour or position that must hold."""

    name: str
    count: int
    color: str = ""
    relation: str = ""  # one of RELATIONS, to every object matched by the clause `target`
    target: int = 0


@dataclass(frozen=True)
class GenEvalTarget:
    """A prompt's facts: every clause of `include` must hold and none of `exclude`."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def target_of(prompt: Prompt) -> GenEvalTarget:
    """Parse the facts of a prompt in GenEval's format; UserError naming the prompt and what is missing or wrong."""
    meta, where = prompt.meta, f"the prompt {prompt.text!r}"
    if missing := [fact for fact in ("tag", "include") if not meta.get(fact)]:
        raise UserError(f"{where} has no {' and no '.join(missing)}: GenEval's rule needs its facts tag and include")
    tag = str(meta["tag"])
    if tag not in TAGS:
        raise registry.unknown(f"tag of {where}:", tag, TAGS)
    if tag == "counting" and not meta.get("exclude"):
        raise UserError(f"{where} has no exclude: a counting prompt says from which count on there are too many")
    include = tuple(_clause(clause, i, where) for i, clause in enumerate(meta["include"]))
    return GenEvalTarget(tag, include, tuple(_clause(clause, 0, where) for clause in meta.get("exclude") or ()))


def _clause(facts: Any, place: int, where: str) -> Clause:
    """Parse one clause; `place` is its index, because a position refers to an earlier clause."""
    try:
        clause = cast(Mapping[str, Any], facts)
        relation, target = clause.get("position") or ("", 0)
        parsed = Clause(str(clause["class"]), int(clause["count"]), clause.get("color") or "", relation, int(target))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{where}: {facts!r} is no clause; one looks like {{'class': 'dog', 'count': 1}}, with 'color' or 'position' "
            f"['left of', 0] where asked for"
        ) from None
    if parsed.count < 1:
        raise UserError(f"{where} asks for {parsed.count} {parsed.name}: a clause counts from 1")
    if parsed.color and parsed.color not in COLOURS:
        raise registry.unknown(f"colour in {where}:", parsed.color, COLOURS)
    if parsed.relation and parsed.relation not in RELATIONS:
        raise registry.unknown(f"relation in {where}:", parsed.relation, RELATIONS)
    if parsed.relation and not 0 <= parsed.target < place:
        raise UserError(
            f"{where}: clause {place} stands {parsed.relation} clause {parsed.target}, which is no earlier one"
        )
    return parsed


# What was found


@dataclass(frozen=True)
class Rule:
    """The constants, under the names of the published script's options."""

    threshold: float = 0.3  # a detection counts above it
    counting_threshold: float = 0.9  # the same where the tag is counting
    max_objects: int = 16  # of a class
    max_overlap: float = 1.0  # IoU from which the lesser of two boxes is dropped; 1 drops none
    position_threshold: float = 0.1  # dead zone, as a share of the summed sizes of two boxes

    def __str__(self) -> str:
        return (
            f"{self.threshold:g}-{self.counting_threshold:g}-{self.max_objects}-{self.max_overlap:g}"
            f"-{self.position_threshold:g}"
        )


OFFICIAL = Rule()


def counted(detections: Sequence[Detection], tag: str, rule: Rule = OFFICIAL) -> DetectionsByClass:
    """Select the detections that count for a tag, by class, best first: above the threshold, at most 16, then without overlaps."""
    floor = rule.counting_threshold if tag == "counting" else rule.threshold
    # Equal scores are ordered by their boxes, so that the order of a detector's list has no effect.
    ranked = sorted((d for d in detections if d.score > floor), key=lambda d: (-d.score, d.box))
    by_class: dict[str, list[Detection]] = {}
    for detection in ranked:
        by_class.setdefault(detection.label, []).append(detection)
    return {name: _apart(these[: rule.max_objects], rule.max_overlap) for name, these in by_class.items()}


def _apart(ranked: Sequence[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap == 1:
        return list(ranked)
    separate: list[Detection] = []
    for detection in ranked:
        if all(iou(better.box, detection.box) < max_overlap for better in separate):
            separate.append(detection)
    return separate


def iou(a: Box, b: Box) -> float:
    """Compute intersection over union of boxes that include their last pixel: a width is x2 - x1 + 1."""
    both = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = _area(a) + _area(b) - both
    return both / either if either else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def relative_position(a: Box, b: Box, threshold: float = OFFICIAL.position_threshold) -> frozenset[str]:
    """Return the sides of b on which a lies: none, one, or two of RELATIONS.

    The offset of the centres is shortened on each axis by `threshold` of the summed sizes and divided by its whole length; a side holds
    beyond 0.5. Two equal squares of side s in a row count from an offset of 0.4 s on: (0.4 s - 0.2 s) / 0.4 s is 0.5, not yet beyond it.
    """
    boxes = np.array([a, b], np.float64).reshape(2, 2, 2)  # box, corner, axis
    centre = boxes.mean(1)
    size = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre[0] - centre[1]
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - threshold * size.sum(0), 0)
    if (np.abs(beyond) < 1e-3).all():
        return frozenset()
    dx, dy = beyond / np.linalg.norm(offset)
    sides = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(side for side, holds in sides.items() if holds)


def to_colour(target: GenEvalTarget, by_class: DetectionsByClass) -> list[Detection]:
    """Return the objects whose colour a rule needs: the first `count` of every clause that names a colour and has enough."""
    these = [(clause, by_class.get(clause.name, ())) for clause in target.include if clause.color]
    return [d for clause, objects in these if len(objects) >= clause.count for d in objects[: clause.count]]


# The verdicts


def official(
    target: GenEvalTarget, by_class: DetectionsByClass, colour: Colour, rule: Rule = OFFICIAL
) -> tuple[bool, str]:
    """Return whether the image is correct, and if not, every reason, one a line."""
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in target.include:
        objects = by_class.get(clause.name, ())[: clause.count]
        why = _fault(clause, objects, matched, colour, rule)
        matched.append(None if why else objects)
        reasons += [why] if why else []
    for clause in target.exclude:
        n = len(by_class.get(clause.name, ()))
        if n >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.name}, found {n}")
    return not reasons, "\n".join(reasons)


def _fault(
    clause: Clause,
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colour: Colour,
    rule: Rule,
) -> str:
    """Return why a clause does not hold for these objects; empty where it does."""
    if len(objects) < clause.count:
        return f"expected at least {clause.count} {clause.name}, found {len(objects)}"
    if clause.color:
        colours = [colour(detection) for detection in objects]
        if colours.count(clause.color) < clause.count:
            return f"expected {clause.count} {clause.color} {clause.name}, found {', '.join(colours)}"
    if clause.relation:
        targets = matched[clause.target]
        if targets is None:
            return f"no target for {clause.name} to be {clause.relation}"
        if astray := _astray(clause, objects, targets, rule):
            return astray
    return ""


def _astray(clause: Clause, objects: Sequence[Detection], targets: Sequence[Detection], rule: Rule) -> str:
    """Describe the first pair that is not in the required relation; empty where all are."""
    for this in objects:
        for target in targets:
            sides = relative_position(this.box, target.box, rule.position_threshold)
            if clause.relation not in sides:
                stands = " and ".join(sorted(sides)) or "on no side of"
                return f"expected {clause.name} {clause.relation} {target.label}, found it {stands} it"
    return ""


def partial(
    target: GenEvalTarget,
    by_class: DetectionsByClass,
    colour: Colour,
    rule: Rule = OFFICIAL,
    *,
    legacy_position_bug: bool = False,
) -> list[float]:
    """Return the credits of the clauses; their mean, in (-inf, 1], is the training reward, and 1 means `strict`.

    A clause that wants k and finds f earns 1 - |k - f| / k, which is negative for f > 2 k. Where f is not k, its colour or position earns
    0. Else its colour earns 1 - |k - m| / k for m objects of the right colour, its position 1 or 0.

    Args:
        target: the clauses of the prompt.
        by_class: the detector's boxes by class.
        colour: names the colour of a box.
        rule: thresholds.
        legacy_position_bug: True for parity with the published server, which appends a 1 after the 0 of a wrong relation, so that
            both objects on the wrong sides earn 0.75 where a missing bug would give 2/3. False is this project's rule.
    """
    credits: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in target.include:
        objects = by_class.get(clause.name, ())
        k = clause.count
        credits.append(1 - abs(k - len(objects)) / k)
        right = len(objects) == k
        if not right:
            credits += [0.0] if clause.color or clause.relation else []
        if right and clause.color:
            m = sum(colour(detection) == clause.color for detection in objects)
            credits.append(1 - abs(k - m) / k)
            right = m == k
        if right and clause.relation:
            targets = matched[clause.target]
            right = targets is not None and not _astray(clause, objects, targets, rule)
            credits += [float(right)]
            credits += [1.0] if legacy_position_bug and targets is not None and not right else []
        matched.append(objects if right else None)
    return credits


def strict(target: GenEvalTarget, by_class: DetectionsByClass, colour: Colour, rule: Rule = OFFICIAL) -> bool:
    """Return whether every clause has its exact count, and every colour and position is right; stricter than `official`."""
    exact = all(len(by_class.get(clause.name, ())) == clause.count for clause in target.include)
    return exact and all(credit == 1 for credit in partial(target, by_class, colour, rule))


def describe(target: GenEvalTarget, by_class: DetectionsByClass, colour: Colour) -> str:
    """Describe the counts for the record: `3 circle (2 red)`; colours appear where they were classified."""
    parts: list[str] = []
    for clause in target.include:
        objects = by_class.get(clause.name, ())
        part = f"{len(objects)} {clause.name}"
        if clause.color and len(objects) >= clause.count:
            hits = sum(colour(detection) == clause.color for detection in objects[: clause.count])
            part += f" ({hits} {clause.color})"
        parts.append(part)
    return ", ".join(parts)
