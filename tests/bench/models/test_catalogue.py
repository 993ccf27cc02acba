"""Two names on the door, each with a card that can be read without loading a weight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpobench.bench.card import find
from gpobench.bench.models import open as opening

SHIPPED = Path(opening.__file__).with_name("tiny")


@pytest.mark.skipif(not (SHIPPED / "recipe.json").is_file(), reason="the embedded model has not been made yet")
def test_both_names_have_a_card_and_an_adapter() -> None:
    tiny, large = find("tiny"), find("sd35m")
    assert {tiny.pipeline, large.pipeline} <= set(opening.ADAPTERS)
    assert (tiny.name, tiny.domain, tiny.height, tiny.width) == ("tiny", "glyphs", 32, 64)
    assert Path(tiny.source) == SHIPPED and tiny.revision is None
    # Flow-GRPO's protocol, arXiv 2505.05470
    assert (large.steps, large.guidance, large.height, large.max_sequence_length) == (40, 4.5, 512, 128)
    assert large.domain == "open" and large.revision


@pytest.mark.skipif(not (SHIPPED / "recipe.json").is_file(), reason="the embedded model has not been made yet")
def test_a_card_costs_no_torch() -> None:
    code = "import sys; from gpobench.bench.card import find; find('tiny'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
