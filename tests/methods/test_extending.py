"""The page on extending: every Python block runs, and what it defines is accepted by the registry."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from gpobench.bench import registry
from gpobench.bench.evaluation.splits import refuse_overlap
from gpobench.bench.spec import Images, Prompt


def test_every_python_block_of_the_page_runs_and_defines_a_part_that_works(repo: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repo / "docs" / "extending.md").read_text("utf-8"), re.DOTALL)
    files = {re.findall(r"class (\w+)", block)[-1]: block for block in blocks}
    assert set(files) == {"Best", "Redness", "Paint"}
    for name, block in files.items():
        (tmp_path / f"{name.lower()}.py").write_text(block, "utf-8")
    at = lambda name: f"{tmp_path / name.lower()}.py:{name}"

    assert registry.load("method", at("Best"))().group == 8
    images: Images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 255
    scorer = registry.scorer(at("Redness"))
    assert scorer(images, [Prompt("a"), Prompt("b")]).value["mean"].tolist() == [0.0, 1.0]
    task = registry.load("task", at("Paint"))()
    refuse_overlap(task, "glyphs")
    assert task.scorers("glyphs") == [task.reward("glyphs"), *task.held_out("glyphs")]
    assert task.evaluation("glyphs").test_images == 4
