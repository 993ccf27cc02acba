"""Renders a regression report for a terminal and as Markdown, JUnit XML and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as Xml

from pydantic_core import to_json

from ..bench.stats.intervals import Estimate
from .board import BASE
from .formatting import cell, number, p_value, plain
from .regress import Finding, RegressionReport

HEAD = ("verdict", "row", "number", "reported", "now", "change", "margin", "floor", "p")
ON_TERMINAL = ("verdict", "row", "reported", "change", "margin", "p")  # in 80 columns; the number stands above
MAX_LINES = 24  # numbers that a terminal shows at once
RULE = (
    "Same: the 90 % interval of the change lies within the margin, or the runs repeat the reported ones to the last digit. Worse: "
    "the floor, a reported gain over the base that must be told again, is lost. Worse, better: otherwise, when the change differs "
    "significantly from none at .5 %, corrected over the trained rows' numbers (Holm). Intervals shown are 95 %, over prompts "
    "and training seeds. No floor (-): the reported gain was not told, so losing it cannot be told either."
)


def headline(report: RegressionReport) -> str:
    """Summarise a report, as in 12 numbers: 10 same, 1 worse, 1 missing."""
    words = [(report.count(verdict), str(verdict)) for verdict in ("same", "better", "worse", "cannot tell")]
    words.append((len(report.missing), "missing"))
    total = len(report.findings) + len(report.missing)
    return f"{total} numbers: {', '.join(f'{n} {word}' for n, word in words if n)}"


def _cells(f: Finding) -> list[str]:
    digits = max(3, 1 - math.floor(math.log10(f.margin)))
    some = f"{f.seeds[0]} of {f.seeds[1]} seeds run, " if f.seeds[0] < f.seeds[1] else ""
    change = f"{some}repeated exactly" if f.repeated else cell(f.change, sign=True)
    floor = "-" if f.floor is None else number(f.floor.mean, 3, sign=True)
    margin = number(f.margin, digits).rstrip("0")
    words = (f.verdict, f.row, f.key, cell(f.reported), number(f.now, digits), change, margin, floor, p_value(f.holm))
    return [plain(word) for word in words]


def _notes(report: RegressionReport) -> list[str]:
    """Return the lines below the table."""
    notes = [f"{f.row} {f.key}: {f.note}." for f in report.findings if f.note]
    missing = [f"{row} {key}" for row, key in report.missing]
    trained = [f for f in report.findings if f.row != BASE]
    without = sum(f.floor is None for f in trained)
    if without:
        notes.append(f"No floor under {without} of {len(trained)} trained numbers: their gain was not told.")
    return [
        plain(line)
        for line in (*notes, *report.notes, *([f"Not in these runs: {', '.join(missing)}."] if missing else []))
    ]


def terminal(report: RegressionReport) -> str:
    """Render a block for every number, worst first; of many numbers only those whose verdict is not "same"."""
    findings = ordered(report)
    shown = [f for f in findings if f.verdict != "same"] if len(findings) > MAX_LINES else findings
    blocks: dict[str, list[list[str]]] = {}
    for f in shown:
        words = dict(zip(HEAD, _cells(f), strict=True))
        blocks.setdefault(words["number"], []).append([words[name] for name in ON_TERMINAL])
    rows = [[*ON_TERMINAL], *(row for block in blocks.values() for row in block)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(ON_TERMINAL))]
    aligned = lambda row: "  ".join(word.ljust(w) for word, w in zip(row, widths, strict=True)).rstrip()
    lines = [aligned([*ON_TERMINAL])] if shown else []
    for key, block in blocks.items():
        lines += [key, *map(aligned, block)]
    if len(shown) < len(findings):
        more = " more" if shown else ""
        lines.append(
            f"same: {len(findings) - len(shown)}{more} numbers, which --json, --junit and a build's summary list one by one"
        )
    return "\n".join([plain(report.protocol), "", *lines, "", *_notes(report), headline(report)]) + "\n"


def markdown(report: RegressionReport) -> str:
    """Render a Markdown table for a summary on a web page."""
    escape = lambda word: word.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    rows = [
        [f"**{word}**" if k == 0 and word == "worse" else escape(word) for k, word in enumerate(_cells(f))]
        for f in ordered(report)
    ]
    lines = ["| " + " | ".join(row) + " |" for row in ([*HEAD], ["---"] * len(HEAD), *rows)]
    top = [f"### {headline(report)}", "", f"{escape(plain(report.protocol))}, against `{plain(report.baseline)}`", ""]
    return "\n".join([*top, *lines, "", RULE, *(f"\n{escape(line)}" for line in _notes(report))]) + "\n"


def junit(reports: Sequence[RegressionReport], allow_unsure: bool = False) -> str:
    """Render a test case for every number: worse fails, cannot tell is an error (skipped when allowed), a missing one is an error."""
    counts = [_counts(report, allow_unsure) for report in reports]
    total = {key: str(sum(of_report[key] for of_report in counts)) for key in counts[0]}
    root = Xml.Element("testsuites", {"name": "gpobench regress", **total})
    for report, of_report in zip(reports, counts, strict=True):
        attributes = {key: str(value) for key, value in of_report.items()}
        suite = Xml.SubElement(root, "testsuite", {"name": plain(report.protocol), **attributes})
        for f in report.findings:
            case = Xml.SubElement(suite, "testcase", classname=plain(f.row), name=plain(f.key))
            text = plain(
                f"{f.verdict}: reported {cell(f.reported)}, now {number(f.now)}, change {cell(f.change, sign=True)}, "
                f"margin {f.margin:g}{f'; {f.note}' if f.note else ''}"
            )
            if f.verdict == "worse":
                Xml.SubElement(case, "failure", type="worse", message=text)
            elif f.verdict == "cannot tell":
                kind = "skipped" if allow_unsure else "error"
                Xml.SubElement(case, kind, {"message": text, **({} if allow_unsure else {"type": "cannot tell"})})
            else:
                Xml.SubElement(case, "system-out").text = text
        for row, key in report.missing:
            case = Xml.SubElement(suite, "testcase", classname=plain(row), name=plain(key))
            Xml.SubElement(case, "error", type="missing", message="not in these runs")
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, "unicode") + "\n"


def _counts(report: RegressionReport, allow_unsure: bool) -> dict[str, int]:
    unsure = 0 if allow_unsure else report.count("cannot tell")
    return {
        "tests": len(report.findings) + len(report.missing),
        "failures": report.count("worse"),
        "errors": unsure + len(report.missing),
        "skipped": report.count("cannot tell") - unsure,
    }


def as_json(reports: Sequence[RegressionReport], code: int) -> str:
    """Render one JSON object: verdicts, counts and the exit code; of several baselines, each in `parts`."""
    counts = {v: sum(report.count(v) for report in reports) for v in ("same", "better", "worse", "cannot tell")}
    whole: dict[str, Any] = {"exit_code": code, "counts": counts}
    whole |= _plain(reports[0]) if len(reports) == 1 else {"parts": [_plain(report) for report in reports]}
    return to_json(whole, indent=1, inf_nan_mode="null").decode() + "\n"


def _plain(report: RegressionReport) -> dict[str, Any]:
    return {
        "baseline": report.baseline,
        "protocol": report.protocol,
        "counts": {verdict: report.count(verdict) for verdict in ("same", "better", "worse", "cannot tell")},
        "findings": [
            {
                "row": f.row,
                "key": f.key,
                "verdict": f.verdict,
                "reported": {"mean": f.reported.mean, "ci": [f.reported.low, f.reported.high], "n": f.reported.n},
                "now": f.now,
                "change": {
                    "mean": f.change.mean,
                    "ci": [f.change.low, f.change.high],
                    "se": f.change.se,
                    "n": f.change.n,
                },
                "p": f.change.p,
                "holm": f.holm,
                "margin": f.margin,
                "floor": _gain(f.floor),
                "gain": _gain(f.gain),
                "seeds": {"now": f.seeds[0], "reported": f.seeds[1]},
                "repeated": f.repeated,
                "note": f.note,
            }
            for f in report.findings
        ],
        "missing": [{"row": row, "key": key} for row, key in report.missing],
        "notes": list(report.notes),
    }


def _gain(e: Estimate | None) -> dict[str, Any] | None:
    return None if e is None else {"mean": e.mean, "ci": [e.low, e.high]}


def ordered(report: RegressionReport) -> list[Finding]:
    """Sort findings, worst first."""
    place = ("worse", "cannot tell", "better", "same")
    return sorted(report.findings, key=lambda f: (place.index(f.verdict), f.row != "base", f.row, f.key))
