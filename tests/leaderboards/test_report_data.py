"""Curves go through their eval points, parts are means of their prompts, and images are those of their noise."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gpobench.bench.errors import UserError
from gpobench.bench.stats import intervals
from gpobench.leaderboards.album import make_album
from gpobench.leaderboards.breakdowns import MAX_RANGES, breakdowns, hardest
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.curves import curve as read_curve
from gpobench.leaderboards.curves import pace as read_pace
from gpobench.leaderboards.measures import measures
from gpobench.leaderboards.rows import runs_by_row
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]
KEY = "other/exact"


def test_a_single_seed_keeps_its_own_eval_points(make_full: Make) -> None:
    (run,) = load_runs([make_full("a", gain=0.4)])
    curve = read_curve("gpo", [run], "nfe")
    assert curve is not None
    assert curve.spent["nfe"] == pytest.approx([0, 250, 500, 750, 1000])
    assert curve.spent["seconds"] == pytest.approx([0, 3, 6, 9, 12])
    table = pd.read_parquet(run.folder / "curve.parquet")
    for k, e in enumerate(curve.scores[KEY]):
        values = table[(table.eval_point == k) & (table.scorer == "other")].value.to_numpy()
        (expected,) = intervals.crossed([intervals.Contrast([values])])
        assert (e.mean, e.low, e.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_seeds_are_interpolated_linearly(make_full: Make) -> None:
    # Every curve here is a straight line over nfe, so where it is read must not matter.
    runs = load_runs([make_full("a", seed=0, gain=0.2, eval_points=5), make_full("b", seed=1, gain=0.4, eval_points=3)])
    curve = read_curve("gpo", runs, "nfe")
    assert curve is not None
    assert curve.spent["nfe"] == pytest.approx([0, 500, 1000])
    assert curve.spent["seconds"] == pytest.approx([0, (6 + 3) / 2, (12 + 6) / 2])
    means = np.array([e.mean for e in curve.scores[KEY]])
    assert means - means[0] == pytest.approx([0, 0.15, 0.3])
    assert all(e.seeds == 2 and e.low <= e.mean <= e.high for e in curve.scores[KEY])
    widths = [e.high - e.low for e in curve.scores[KEY]]
    assert widths[-1] > widths[0]  # the seeds diverge


def test_the_pace_is_read_off_the_curves(make_full: Make) -> None:
    """Straight lines from the same base: the steepest has half the best gain at half the budget, a flat one never."""
    folders = [make_full(f"{m}{s}", m, s, gain) for m, gain in (("gpo", 0.4), ("awm", 0.1)) for s in range(2)]
    runs = load_runs(folders)
    rows = runs_by_row(build_board(runs).rows, runs)
    curves = [c for label in ("gpo", "awm") if (c := read_curve(label, rows[label], "nfe"))]
    pace = read_pace(curves, rows, KEY, "nfe", 1000.0)
    assert pace is not None and set(pace.rows) == {"gpo", "awm"}
    assert pace.target == pytest.approx(0.2)
    (over, until), (slow, never) = pace.rows["gpo"], pace.rows["awm"]
    assert over.mean == pytest.approx(0.2) and slow.mean == pytest.approx(0.05)
    assert until.mean == pytest.approx(500, abs=1) and until.low <= until.mean <= until.high
    assert np.isinf(never.mean)
    assert read_pace(curves, rows, "engine/none", "nfe", 1000.0) is None
    assert read_pace(curves, rows, KEY, "nfe", float("nan")) is None


def test_a_run_without_eval_points_has_no_curve_and_a_damaged_file_is_named(make: Make, make_full: Make) -> None:
    assert read_curve("gpo", load_runs([make("a")]), "nfe") is None
    run_dir = make_full("b")
    (run_dir / "curve.parquet").write_bytes(b"none")
    with pytest.raises(UserError, match="curve.parquet"):
        read_curve("gpo", load_runs([run_dir]), "nfe")


def test_a_part_is_the_mean_of_its_prompts(make: Make) -> None:
    runs = load_runs([make("a", strata=["long" if p < 30 else "short" for p in range(40)])])
    made = build_board(runs, key=KEY)
    texts = ["a sign" for _ in range(40)]
    (parts,) = breakdowns(made.key, runs_by_row(made.rows, runs), texts)
    assert (parts.name, parts.parts, parts.prompts) == ("By kind of prompt", ["long", "short"], [30, 10])
    after, gain = parts.cells["gpo"][1]
    assert after.mean == pytest.approx(runs[0].after[KEY][30:].mean())
    assert gain is not None and gain.mean == pytest.approx((runs[0].after[KEY] - runs[0].before[KEY])[30:].mean())
    assert parts.cells["base"][0][0].mean == pytest.approx(runs[0].before[KEY][:30].mean())
    assert parts.cells["base"][0][1] is None


def test_prompts_are_parted_by_length_and_by_number(make: Make) -> None:
    runs = load_runs([make("a")])
    made = build_board(runs, key=KEY)
    texts = [f'{("two", "three")[p % 2]} signs that say "one{"x" * (p % 20)}"' for p in range(40)]
    lengths, numbers = breakdowns(made.key, runs_by_row(made.rows, runs), texts)
    assert (numbers.name, numbers.parts) == ("By the number named", ["2", "3"])  # "one" is quoted, and counts nothing
    assert len(lengths.parts) <= MAX_RANGES and sum(lengths.prompts) == 40
    assert lengths.parts[0].startswith("3 to ") and lengths.parts[-1].endswith(" to 22")


def test_the_hardest_prompts_come_first(
    make: Make, before_and_after: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> None:
    before, after = before_and_after(0.1, 1)
    after[5], after[9], before[9] = 0.0, 0.01, 0.9
    after[7, 0], before[11] = np.nan, np.nan
    (run,) = load_runs([make("a", scores_by_key={KEY: (before, after), "engine/exact": before_and_after(0.1, 1)})])
    lowest, losses = hardest([run], KEY)
    assert [case.prompt for case in lowest[:2]] == [5, 9]
    assert losses[0].prompt in (5, 9) and all(case.after < case.before for case in losses)
    assert 11 not in {case.prompt for case in hardest([run], KEY, 40)[0]}  # nothing to compare with
    assert next(c.images for c in hardest([run], KEY, 40)[0] if c.prompt == 7) == 1


def test_an_album_holds_each_picture_once_and_where_it_belongs(make_full: Make) -> None:
    runs = load_runs([make_full("a", "gpo", 0, 0.1), make_full("b", "awm", 0, 0.2)])
    rows = {run.record.method: [run] for run in runs}
    album = make_album(rows, [KEY])
    assert album is not None and album.noises == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(album.pictures) == 6 * 3  # the base's are the same under both
    for run in runs:
        stored = np.load(run.folder / "samples" / "images.npz")
        for k, frame in enumerate(album.frames[run.record.method]):
            assert frame.after is not None and frame.before == album.frames["gpo"][k].before
            data = base64.b64decode(album.pictures[frame.after].partition(",")[2])
            assert (np.asarray(Image.open(io.BytesIO(data))) == stored["after"][k]).all()
            noise = album.noises[k]
            assert frame.scores[KEY] == (run.before[KEY][noise], run.after[KEY][noise])


def test_an_album_fits_its_room_and_large_pictures_are_reduced(make_full: Make) -> None:
    small = {"gpo": load_runs([make_full("a")])}
    whole = make_album(small, [])
    assert whole is not None
    half = make_album(small, [], sum(map(len, whole.pictures)) // 2)
    assert half is not None and 1 <= len(half.noises) <= 3 and half.pictures == whole.pictures[: len(half.pictures)]
    large = make_album({"gpo": load_runs([make_full("b", size=300)])}, [])
    assert large is not None and large.size == (600, 300) and large.pictures[0].startswith("data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(large.pictures[0].partition(",")[2]))) as picture:
        assert picture.size == (320, 160)


def test_runs_without_pictures_have_no_album(make: Make, make_full: Make) -> None:
    assert make_album({"gpo": load_runs([make("a")])}, []) is None
    run_dir = make_full("b")
    (run_dir / "samples" / "images.npz").write_bytes(b"none")
    with pytest.raises(UserError, match="images.npz"):
        make_album({"gpo": load_runs([run_dir])}, [])


def test_less_of_drift_and_of_spend_is_better(
    make: Make, before_and_after: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> None:
    scores_by_key = {
        "engine/exact": before_and_after(0.1, 1),
        KEY: before_and_after(0.1, 2),
        "drift-x/paired": (np.zeros((40, 2)), np.ones((40, 2))),
    }
    runs = load_runs([make("a", scores_by_key=scores_by_key)])
    by_name = {m.name: m for m in measures(build_board(runs))}
    assert {name for name, m in by_name.items() if m.less} == {"drift-x/paired (drift)", "spent: nfe", "spent: seconds"}
    assert by_name["spent: nfe"].values["base"].mean == 0 and by_name["spent: nfe"].values["gpo"].mean == 1000
    assert by_name["drift-x/paired (drift)"].values["base"].mean == 0
