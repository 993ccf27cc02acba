"""Measures pictures of the second embedded model: texts by RapidOCR's recogniser line by line, shapes by their colour and outline.

Plain forms of the training scorers, for progress and for the model card; the tables of the tasks come from the scorers themselves.
"""

from __future__ import annotations

import numpy as np

from ..assets.drawing_prompts import ShapePrompt
from ..assets.drawings import PITCH
from ..assets.drawn import DrawnShape, find_shapes, text_lines
from .tiny_measure import recogniser

LINE_WIDTH, LINE_HEIGHT = 160, 48  # px of a line as the recogniser sees it


def read_text(image: np.ndarray) -> str:
    """Read an image (32, 64, 3) uint8 line by line, the lines with a space between them; capitals."""
    import cv2
    from rapidocr.ch_ppocr_rec import TextRecInput

    lines = [
        cv2.resize(np.ascontiguousarray(line[..., ::-1]), (LINE_WIDTH, LINE_HEIGHT), interpolation=cv2.INTER_CUBIC)
        for line in text_lines(image)
    ]
    texts = (recogniser(LINE_WIDTH)(TextRecInput(img=lines)).txts if lines else None) or ()
    return " ".join("".join(text.split()).upper() for text in texts)


def shows(image: np.ndarray, prompt: ShapePrompt) -> bool:
    """Return whether an image shows exactly what a prompt asks for: the number of each kind, its colour, its side of the other."""
    shapes = find_shapes(image)
    found = [[shape for shape in shapes if shape.kind == clause["class"]] for clause in prompt.include]
    for clause, these in zip(prompt.include, found, strict=True):
        if len(these) != clause["count"] or any(s.colour != clause.get("color", s.colour) for s in these):
            return False
        if "position" in clause:
            relation, other = clause["position"]
            if not found[other] or side_of(these[0], found[other][0]) != relation:
                return False
    return len(shapes) == sum(clause["count"] for clause in prompt.include)


def side_of(shape: DrawnShape, other: DrawnShape) -> str:
    """Return on which side of another a shape stands, by the longer offset of their centres; "" within half a cell."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = shape.box, other.box
    dx, dy = (x1 + x2 - u1 - u2) / 2, (y1 + y2 - v1 - v2) / 2
    if max(abs(dx), abs(dy)) < PITCH / 2:
        return ""
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
