"""Scorer `geneval`: detects the objects of an image and checks them against the prompt by GenEval's rule.

`geneval:DETECTOR` is one rule over any detector of `detectors.py`, and its id names all three parts: rule, detector, colour classifier.
The published benchmark is the rule with `mmdet`; every other detector gives another measurement. Metrics: `partial` is the training
reward of Flow-GRPO, `correct` the published verdict, `strict` the verdict on exact numbers.

`geneval:DETECTOR-legacy` credits wrong relations as Flow-GRPO's reward server does (see `geneval_rules.partial`). What else changes
numbers on that server is not reproduced: JPEG compression, and red and blue exchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..bench import registry
from ..bench.assets.glyphs import PAPERS, SHAPE_COLOURS, SHAPES, draw_shapes, shapes_prompt
from ..bench.spec import Images, Prompt, Scores, check_images
from . import geneval_rules as rules
from .colours import ColourClassifier, PaletteColours, clip_id, open_clip_colours
from .detectors import DETECTORS, Detection, Detector, open_detector

DEFAULT, LEGACY = "mask2former", "-legacy"
# The published 0.9 is Mask2Former's. Scores of these are sigmoids trained on quality: clear finds lie at .7 to .95 in their authors' own
# examples, and 0.9 would drop every third. Theirs was not calibrated either: it is in the scorer's id.
COUNTING = {"rtdetr": 0.5, "dfine": 0.5, "yolo": 0.5}
GLYPHS = ("palette", "shapes")  # detectors of the embedded model's shapes, which have three colours
METRICS = ("partial", "correct", "strict")


class GenEvalScorer:
    """Scores images by a detector and a rule; the colour classifier is made when the first prompt asks for a colour."""

    metrics: Sequence[str] = METRICS

    def __init__(
        self,
        detector: Detector,
        colours: Callable[[], ColourClassifier],
        *,
        colours_id: str,
        legacy_position_bug: bool = False,
        rule: rules.Rule = rules.OFFICIAL,
    ) -> None:
        """Keep the parts; `colours` makes the classifier, which may be large or not installed."""
        self.detector, self.rule, self.legacy = detector, rule, legacy_position_bug
        self._make_colours, self._colours = colours, None
        self.name = f"geneval-{detector.name}" + (LEGACY if legacy_position_bug else "")
        kind = "partial-legacy" if legacy_position_bug else "partial-fixed"
        self.id = f"geneval-1[{kind}-{rule}]/{detector.id}/{colours_id}"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to the three metrics; NaN with a reason where the detector or the classifier failed.

        UserError where a prompt lacks GenEval's facts, or asks for a class that the detector does not have.
        """
        check_images(images, prompts)
        targets = [self._target(prompt) for prompt in prompts]
        if any(clause.color for each in targets for clause in each.include):
            self._colours = self._colours or self._make_colours()
        value = {metric: np.full(len(images), np.nan) for metric in METRICS}
        reasons: dict[int, str] = {}
        notes = [""] * len(images)
        for row, detections in enumerate(self._detect(images)):
            try:
                if isinstance(detections, Exception):
                    raise detections
                verdict, notes[row] = self._judge(images[row], targets[row], detections)
            except Exception as error:  # a detector or a network may fail in any way; that costs one image, not a run
                lines = str(error).strip().splitlines() or ["no message"]
                reasons[row] = f"{type(error).__name__}: {lines[-1]}"
            else:
                for metric in METRICS:
                    value[metric][row] = verdict[metric]
        return Scores(value, reasons, notes)

    def _target(self, prompt: Prompt) -> rules.GenEvalTarget:
        target = rules.target_of(prompt)
        for clause in (*target.include, *target.exclude):
            if clause.name not in self.detector.classes:
                raise registry.unknown(
                    f"object in the prompt {prompt.text!r} for the detector {self.detector.name}:",
                    clause.name,
                    self.detector.classes,
                )
        return target

    def _detect(self, images: Images) -> list[list[Detection] | Exception]:
        """Detect the objects of each image; a batch that fails is repeated image by image, to find the one at fault."""
        if not len(images):
            return []
        try:
            return list(_whole(self.detector(images), len(images)))
        except Exception as error:
            if len(images) == 1:
                return [error]
            return [answer for i in range(len(images)) for answer in self._detect(images[i : i + 1])]

    def _judge(
        self, image: np.ndarray, target: rules.GenEvalTarget, detections: Sequence[Detection]
    ) -> tuple[Mapping[str, float], str]:
        by_class = rules.counted(detections, target.tag, self.rule)
        colour = self._seen_colours(image, rules.to_colour(target, by_class))
        correct, why = rules.official(target, by_class, colour, self.rule)
        credits = rules.partial(target, by_class, colour, self.rule, legacy_position_bug=self.legacy)
        strict = rules.strict(target, by_class, colour, self.rule)
        note = rules.describe(target, by_class, colour) + (f": {'; '.join(why.splitlines())}" if why else "")
        return {"partial": float(np.mean(credits)), "correct": float(correct), "strict": float(strict)}, note

    def _seen_colours(self, image: np.ndarray, objects: Sequence[Detection]) -> rules.Colour:
        """Classify the colours of one image's objects in one call."""
        if not objects or self._colours is None:
            return lambda thing: ""
        named = dict(zip(map(id, objects), self._colours(image, objects), strict=True))
        return lambda thing: named[id(thing)]

    def self_test(self) -> None:
        """Score images whose answers are known; RuntimeError with the detections where one is wrong.

        For the detectors of shapes: drawn shapes, right and wrong in number and colour. A detector of photographed objects has no known
        answer to a drawn image, so only this is tested there: a blank image has no confident detection, an answer has the form of the
        contract, and it knows all classes that GenEval can ask for (80).
        """
        if self.detector.name in GLYPHS:
            self._prints()
        else:
            self._blank()

    def _prints(self) -> None:
        rng = np.random.default_rng(0)
        rows: list[tuple[np.ndarray, Prompt, float]] = []
        for i, kind in enumerate(SHAPES):
            for j, (colour, rgb) in enumerate(SHAPE_COLOURS.items()):
                n, paper = 1 + (2 * i + j) % 5, list(PAPERS.values())[(i + j) % 3]
                picture = draw_shapes(kind, n, rgb, paper, rng)
                many: dict[str, object] = {"include": [{"class": kind, "count": n}], "tag": "counting"}
                text = shapes_prompt(kind, n, colour)
                rows.append((picture, Prompt(text, {**many, "exclude": [{"class": kind, "count": n + 1}]}), 1.0))
                clause: dict[str, object] = {"class": kind, "count": n, "color": colour}
                rows.append((picture, Prompt(text, {"tag": "colors", "include": [clause]}), 1.0))
                other = next(name for name in SHAPE_COLOURS if name != colour)
                rows.append((picture, Prompt(text, {"tag": "colors", "include": [{**clause, "color": other}]}), 0.0))
        scores = self(np.stack([picture for picture, _, _ in rows]), [prompt for _, prompt, _ in rows])
        wrong = [
            f"{prompt.text!r} ({prompt.meta['tag']}): {scores.reasons.get(i) or (scores.notes or [])[i]}"
            for i, (_, prompt, right) in enumerate(rows)
            if scores.value["strict"][i] != right
        ]
        if wrong:
            raise RuntimeError(f"{self.id} misjudged {len(wrong)} of {len(rows)} prints: {'; '.join(wrong[:3])}")

    def _blank(self) -> None:
        if len(set(self.detector.classes)) != 80 or not {"computer mouse", "tv remote"} <= set(self.detector.classes):
            raise RuntimeError(f"{self.id} knows {len(set(self.detector.classes))} classes, not GenEval's 80")
        (detections,) = _whole(self.detector(np.full((1, 256, 256, 3), 255, np.uint8)), 1)
        sure = [f"{d.label} ({d.score:.2f})" for d in detections if d.score > self.rule.counting_threshold]
        if sure:
            raise RuntimeError(f"{self.id} is sure to see {', '.join(sure[:3])} on a blank page")


def _whole(answers: list[list[Detection]], n: int) -> list[list[Detection]]:
    """Raise ValueError where a detector's answer is not one list an image."""
    if len(answers) != n:
        raise ValueError(f"the detector answered {len(answers)} lists for {n} pictures")
    return answers


def make(variant: str | None = None) -> GenEvalScorer:
    """Make the scorer over a detector (default `mask2former`), with `-legacy` for the server's credit; Missing where a part is absent."""
    name = variant or DEFAULT
    legacy = name.endswith(LEGACY)
    name = name.removesuffix(LEGACY)
    if name not in DETECTORS:
        raise registry.unknown("variant of the scorer geneval:", name, DETECTORS)
    shapes = name in GLYPHS
    return GenEvalScorer(
        open_detector(name),
        PaletteColours if shapes else open_clip_colours,
        colours_id=PaletteColours.id if shapes else clip_id(),
        legacy_position_bug=legacy,
        rule=replace(rules.OFFICIAL, counting_threshold=COUNTING.get(name, rules.OFFICIAL.counting_threshold)),
    )
