"""Every format contains all numbers whose verdict is not "same", and the counts are those of the findings."""

from __future__ import annotations

import json
from xml.etree import ElementTree as Xml

from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.stats.intervals import Estimate
from gpobench.bench.stats.significance import Verdict
from gpobench.leaderboards.regress import Finding, RegressionReport
from gpobench.leaderboards.render_regression import MAX_LINES, as_json, headline, junit, markdown, terminal

VERDICTS: tuple[Verdict, ...] = ("same", "better", "worse", "cannot tell")


def make_report(verdicts: list[Verdict]) -> RegressionReport:
    number = Estimate(0.5, 0.4, 0.6, 40)
    findings = [
        Finding(f"row{k}", "engine/exact", v, number, 0.5, Estimate(0.0, -0.1, 0.1, 40), 0.3, 0.05, (2, 2), False)
        for k, v in enumerate(verdicts)
    ]
    return RegressionReport("mine.toml", "toy on tiny", tuple(findings), (("lost", "engine/soft"),), ())


@given(st.lists(st.sampled_from(VERDICTS), min_size=1, max_size=3 * MAX_LINES))
def test_every_format_contains_what_is_not_the_same(verdicts: list[Verdict]) -> None:
    shown_report = make_report(verdicts)
    shown = [line.split() for line in terminal(shown_report).splitlines()]
    rows = {word for words in shown for word in words}
    for k, verdict in enumerate(verdicts):
        assert verdict == "same" or f"row{k}" in rows
        assert f"| row{k} |" in markdown(shown_report)
    same = verdicts.count("same")
    if len(verdicts) <= MAX_LINES:
        assert all(f"row{k}" in rows for k in range(len(verdicts)))
    elif same:
        assert f"same: {same} " in terminal(shown_report)
    assert terminal(shown_report).endswith(f"{headline(shown_report)}\n") and "lost engine/soft" in terminal(
        shown_report
    )
    root = Xml.fromstring(junit([shown_report]))
    assert int(root.attrib["tests"]) == len(verdicts) + 1 and int(root.attrib["failures"]) == verdicts.count("worse")
    assert int(root.attrib["errors"]) == verdicts.count("cannot tell") + 1
    plain = json.loads(as_json([shown_report], shown_report.code()))
    assert [f["verdict"] for f in plain["findings"]] == verdicts and plain["counts"]["same"] == same


def test_a_terminal_of_eighty_columns_holds_the_table() -> None:
    number, change = Estimate(0.123, 0.1, 0.2, 40), Estimate(-0.102, -0.15, -0.05, 40)
    rows = [("worse", "flow-grpo:fast", 0.05), ("cannot tell", "diffusion-dpo", 0.05), ("same", "base", 0.08)]
    verdicts = tuple(
        Finding(row, "geneval-palette/correct", verdict, number, 0.5, change, 0.3, margin, (3, 3), False)
        for verdict, row, margin in rows
    )
    lines = terminal(RegressionReport("mine.toml", "counting on tiny", verdicts, (), ())).splitlines()
    assert all(len(line) <= 80 for line in lines)
    # One block for all rows of a number; the worst stands first, each with its own margin.
    assert lines.count("geneval-palette/correct") == 1
    found = {line.split()[0]: line for line in lines if line.split()[:1] in (["worse"], ["cannot"], ["same"])}
    assert list(found) == ["worse", "cannot", "same"] and " .05 " in found["worse"] and " .08 " in found["same"]


def test_a_lost_floor_and_those_that_are_not_there_are_said() -> None:
    number, change = Estimate(0.45, 0.4, 0.5, 40), Estimate(-0.054, -0.07, -0.04, 40)
    floor, gain = Estimate(0.056, 0.03, 0.08, 40), Estimate(0.002, -0.02, 0.02, 40)
    reason = "the gain of +.056 is not told any more: +.002 [-.02, +.02]"
    lost = Finding("gpo", "reader/exact", "worse", number, 0.39, change, 0.01, 0.03, (3, 3), False, reason, floor, gain)
    none = Finding("rwr", "reader/exact", "same", number, 0.45, change, 0.01, 0.03, (3, 3), False)
    shown_report = RegressionReport("mine.toml", "toy on tiny", (lost, none), (), ())
    for text in (terminal(shown_report), markdown(shown_report)):
        assert f"gpo reader/exact: {reason}" in text.replace("\\", "")
        assert "No floor under 1 of 2 trained numbers" in text
    assert "| +.056 |" in markdown(shown_report) and reason in junit([shown_report])
    stated = json.loads(as_json([shown_report], 1))["findings"]
    assert stated[0]["floor"]["mean"] == 0.056 and stated[0]["gain"]["mean"] == 0.002 and stated[1]["floor"] is None
