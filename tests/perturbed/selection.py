"""Marks the tests whose result depends on how the processor rounds: `numeric`, and a sample of them `portable_sample`.

    pytest --perturb -m "numeric and not slow"     all of them
    pytest --perturb -m portable_sample            half a minute of processor time; imports the sample's files only

The lists hold names of files, wherever under tests/ they lie.
"""

from __future__ import annotations

from pathlib import Path

import pytest

# Their tests compute no matrix product or convolution in torch, in this process or another. Every other file is numeric, a new
# one too until it is named here.
EXACT = frozenset(
    f"test_{name}.py"
    for name in """
    aggregate app baseline board budget commands config downloads distances fetch files geneval_rules glyphs in_process intervals
    method_colours model_spec package palette paper_numbers parts planted plots prompts ranking record registry remote render
    render_regression report report_browser report_data rules run_dir server signals tesseract weight_store
    """.split()
)

# Each kind of computation once: file, and what the names of its tests begin with.
SAMPLE = {
    "test_perturbation.py": "test_",
    "test_make_pairs.py": "test_the_",
    "test_rig.py": "test_",
    "test_evaluator.py": "test_",
    "test_lora.py": "test_",
    "test_flow.py": "test_",
    "test_diffusion_dpo.py": "test_after_a_refresh",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m portable_sample` imports the sample's files only: importing all of them takes as long as the sample."""
    skips = collection_path.suffix == ".py" and collection_path.name not in SAMPLE
    return True if skips and config.option.markexpr == "portable_sample" else None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name not in EXACT:
            item.add_marker("numeric")
        if item.name.startswith(SAMPLE.get(item.path.name, "-")):
            item.add_marker("portable_sample")
