"""Plans against closed forms, drawn boards and the shipped board; bad pilots are refused in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from gpobench.bench.errors import UserError
from gpobench.bench.stats import planning
from gpobench.bench.stats.planning import BASE, Components, Design, LentSpread, all_pairs, estimate_components
from gpobench.leaderboards.baseline import read_baseline

SHIPPED = Path(__file__).resolve().parents[3] / "leaderboards" / "tiny-ocr.toml"
Gains = dict[str, list[np.ndarray]]


def drawn(
    rng: np.random.Generator, *, rows: int = 4, seeds: int = 3, prompts: int = 400, images: int = 0, sd: float = 0.02,
    gains: Sequence[float] = (),
) -> Gains:  # fmt: skip
    """Gains of rows whose prompts have a standard deviation of .1, images .2, the rest .15 and .3 of images, seeds `sd`."""
    table: Gains = {}
    for r in range(rows):
        shape = (prompts, images) if images else (prompts, 1)
        own = 0.1 * rng.standard_normal((prompts, 1)) + (0.2 * rng.standard_normal(shape) if images else 0)
        table[f"row {r}"] = []
        for _ in range(seeds):
            rest = 0.15 * rng.standard_normal((prompts, 1)) + (0.3 * rng.standard_normal(shape) if images else 0)
            mean = (gains[r] if gains else 0.0) + sd * rng.standard_normal()
            made = mean + own + rest
            table[f"row {r}"].append(made if images else made[:, 0])
    return table


def known(rows: int = 2, seeds: float = 1e-4, prompt: float = 0.01, residual: float = 0.02) -> Components:
    labels = tuple(f"row {r}" for r in range(rows))
    variance = np.full(rows, seeds)
    return Components(
        labels, prompt * np.eye(rows), np.full(rows, residual), variance, np.tile(variance, (50, 1)), 400, 2
    )


def shipped(key: str, seeds: Sequence[int]) -> Gains:
    baseline, scores = read_baseline(SHIPPED)
    base = scores.by[BASE, key][0]
    labels = [claim.label for claim in baseline.row if claim.label != BASE]
    return {label: [scores.by[label, key][s] - base for s in seeds] for label in labels}


# Components


def test_components_are_those_that_made_the_scores() -> None:
    rng = np.random.default_rng(0)
    found = [estimate_components(drawn(rng, rows=8), 1) for _ in range(10)]
    assert np.mean([np.diag(c.prompt) for c in found]) == pytest.approx(0.01, rel=0.1)
    assert np.mean([c.residual for c in found]) == pytest.approx(0.0225, rel=0.05)
    assert np.mean([c.seeds for c in found]) == pytest.approx(0.0004, rel=0.35)
    assert np.mean([c.prompt[0, 1] for c in found]) == pytest.approx(0, abs=0.001)


def test_images_have_a_part_of_their_own_that_more_of_them_average_out() -> None:
    c = estimate_components(drawn(np.random.default_rng(0), rows=6, images=4), 4)
    assert c.prompt_images == pytest.approx(0.01 / 0.02, abs=0.15)
    assert c.residual_images == pytest.approx(0.0225 / 0.045, abs=0.1)
    one, many = c.with_images(1), c.with_images(10**6)
    assert np.diag(one.prompt).mean() == pytest.approx(0.05, rel=0.25)
    assert many.residual.mean() == pytest.approx(0.0225, rel=0.2)
    assert c.with_images(4) is c


def test_scores_by_prompt_do_not_show_the_images_part() -> None:
    c = estimate_components(drawn(np.random.default_rng(0)), 2)
    assert math.isnan(c.prompt_images) and c.with_images(2) is c
    with pytest.raises(UserError, match="8 images a prompt cannot be planned: these are scores by prompt"):
        c.with_images(8)


def test_no_spread_of_seeds_is_drawn_where_there_is_none_and_a_large_one_where_there_is() -> None:
    rng = np.random.default_rng(1)
    residual = np.full(11, 1.0)
    for true in (0.0, 20.0):
        observed = (true + residual) * rng.chisquare(2, (20, 11)) / 2
        draws = [planning.draw_seed_variances(line, residual, np.full(11, 2), rng) for line in observed]
        middle = float(np.median(draws))
        assert middle < 0.4 if true == 0 else 10 < middle < 35


def test_a_pilot_that_cannot_be_planned_from_is_refused() -> None:
    rng = np.random.default_rng(0)
    two = drawn(rng, prompts=2)
    with pytest.raises(UserError, match="2 prompts with a score in every row: below 5"):
        estimate_components(two, 1)
    with pytest.raises(UserError, match="one seed of row 0, which shows no spread"):
        estimate_components(drawn(rng, seeds=1), 1)
    with pytest.raises(UserError, match="all scores of the pilot are equal"):
        estimate_components({"a": [np.zeros(40)] * 2, "b": [np.zeros(40)] * 2}, 1)
    holes = drawn(rng)
    holes["row 1"][0][:] = np.nan
    with pytest.raises(UserError, match="row row 1 has a seed without any score"):
        estimate_components(holes, 1)
    with pytest.raises(UserError, match="a stratum of the pilot has a single prompt"):
        estimate_components(drawn(rng, prompts=9), 1, strata=["a"] * 8 + ["b"])


def test_one_seed_takes_the_spread_that_is_lent() -> None:
    gains = drawn(np.random.default_rng(0), seeds=1, rows=2)
    lent = {label: LentSpread(0.0009, 5.4, 0.0225) for label in gains}
    c = estimate_components(gains, 1, lent=lent)
    assert c.residual == pytest.approx(0.0225) and math.sqrt(c.seeds[0]) == pytest.approx(0.03, rel=0.15)
    assert c.prompt[0, 0] == pytest.approx(0.01, rel=0.5)  # what is left of .0325


# What a design tells


def test_many_seeds_leave_the_closed_form_of_the_normal_distribution() -> None:
    """Power and MDE of a difference whose noise is as good as known."""
    c = known(rows=2)
    design = Design(200, 2, 400)
    seen = planning.resolve_pairs(c, design, [("row 0", "row 1")], 1, difference=0.02, power=0.8)
    sd = math.sqrt(2 * 0.01 / 400 + 2 * (1e-4 + 0.02 / 400) / 200)
    assert seen.half_width[0] == pytest.approx(1.96 * sd, rel=0.03)
    assert seen.mde[0] == pytest.approx((1.96 + 0.8416) * sd, rel=0.03)
    expected = scipy.stats.norm.cdf(0.02 / sd - 1.96)
    assert seen.power[0] == pytest.approx(expected, abs=0.03)


def test_the_mde_is_told_with_its_power_and_the_base_has_no_noise_of_its_own() -> None:
    c, design = known(rows=3), Design(3, 2, 400)
    pairs = [("row 0", "row 1"), ("row 0", BASE)]
    seen = planning.resolve_pairs(c, design, pairs, 6, difference=0.01, power=0.8)
    again = planning.resolve_pairs(c, design, pairs, 6, difference=float(seen.mde[0]), power=0.8)
    assert again.power[0] == pytest.approx(0.8, abs=0.001)
    assert seen.mde[1] < seen.mde[0] and seen.power[1] > seen.power[0]
    alone = planning.resolve_pairs(c, design, pairs, 1, difference=0.01, power=0.8)
    assert (alone.mde < seen.mde).all() and alone.half_width == pytest.approx(seen.half_width)


def test_more_of_anything_tells_more() -> None:
    c = known(rows=4)
    mde = lambda *design: planning.resolve_pairs(
        c, Design(*design), [("row 0", BASE)], 10, difference=0.02, power=0.8
    ).mde[0]
    assert mde(2, 2, 400) > mde(3, 2, 400) > mde(10, 2, 400) > mde(10, 2, 4000)
    floor = planning.prompt_deviation(c, Design(2, 2, 400), ("row 0", BASE))
    assert floor == pytest.approx(0.1 / 20)


def test_planned_power_is_that_of_the_tables() -> None:
    """Boards are drawn and tested as tables are; the share that tells the pair is the power of the plan."""
    from gpobench.bench.stats.intervals import Contrast, crossed, table_spreads

    rng, told, draws = np.random.default_rng(3), 0, 120
    labels = [f"row {r}" for r in range(5)]
    for _ in range(draws):
        board = drawn(rng, rows=5, prompts=100, sd=0.01, gains=(0.06, 0, 0, 0, 0))
        spreads = table_spreads(board)
        (estimate,) = crossed([Contrast(board[labels[0]], test=True, spreads=[spreads[labels[0]]])])
        told += estimate.p is not None and estimate.p < 0.05
    c = Components(
        tuple(labels), 0.01 * np.eye(5), np.full(5, 0.0225), np.full(5, 1e-4), np.full((50, 5), 1e-4), 100, 1
    )
    seen = planning.resolve_pairs(c, Design(3, 1, 100), [(labels[0], BASE)], 1, difference=0.06, power=0.8)
    assert told / draws == pytest.approx(seen.power[0], abs=0.09)


# Told pairs


def test_holm_counts_are_holms() -> None:
    from gpobench.bench.stats.law import holm

    p = np.random.default_rng(0).random((200, 6)) ** 4
    expected = [sum(x < planning.LEVEL for x in holm(line)) for line in p.tolist()]
    assert planning.count_told(p).tolist() == expected


def test_gains_are_shrunk_by_as_much_as_their_noise_makes_of_their_spread() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(40)
    observed = truth + rng.standard_normal(40)
    mean, _ = planning.shrink(observed, np.eye(40))
    assert np.square(mean - truth).mean() < 0.75 * np.square(observed - truth).mean()
    exact, spread = planning.shrink(observed, 1e-9 * np.eye(40))
    assert exact == pytest.approx(observed, abs=1e-3) and np.abs(spread).max() < 1e-8
    few, error = planning.shrink(observed[:2], np.eye(2))
    assert few.tolist() == observed[:2].tolist() and error.tolist() == np.eye(2).tolist()


def test_a_gain_far_from_the_others_keeps_its_own() -> None:
    observed = np.array([0.0, 1.0, -1.0, 0.5, -0.5, 0.2, 30.0])
    mean, _ = planning.shrink(observed, np.eye(7))
    assert mean[-1] > 28 and abs(mean[1]) < 0.8


def test_a_finished_board_tells_what_its_own_scores_predict() -> None:
    """With all of its seeds in the pilot nothing is left to guess."""
    for key, told in (("reader/exact", 15), ("rapidocr/exact", 40)):
        c = estimate_components(shipped(key, (0, 1, 2)), 2)
        band = planning.predict_told(c, Design(3, 2, 328), all_pairs(c.labels), draws=100)
        assert band.low <= told <= band.high and band.high - band.low <= 3 and band.pairs == 66


def test_the_told_pairs_of_drawn_boards_lie_in_the_band() -> None:
    """The miniature of benchmarks/plan_calibration.py: the band of 90 % from two of three seeds."""
    from gpobench.bench.stats.intervals import Contrast, crossed, table_spreads

    rng, inside, boards = np.random.default_rng(4), 0, 20
    for _ in range(boards):
        gains = 0.02 + 0.03 * rng.standard_t(4, 5)
        board = drawn(rng, rows=5, prompts=150, sd=0.01, gains=gains.tolist())
        c = estimate_components({label: seeds[:2] for label, seeds in board.items()}, 1)
        band = planning.predict_told(c, Design(3, 1, 150), all_pairs(c.labels), draws=100)
        spreads = table_spreads(board)
        contrasts = [
            Contrast(
                board[a], [] if b == BASE else board[b], test=True, spreads=[spreads[x] for x in (a, b) if x != BASE]
            )
            for a, b in all_pairs(list(board))
        ]
        told = int(planning.count_told(np.array([[e.p for e in crossed(contrasts)]], float))[0])
        inside += band.low <= told <= band.high
    assert inside >= 15


def test_other_prompts_make_the_band_wider() -> None:
    c = estimate_components(shipped("reader/exact", (0, 1)), 2)
    same = planning.predict_told(c, Design(3, 2, 328), all_pairs(c.labels), draws=100)
    other = planning.predict_told(c, Design(3, 2, 329), all_pairs(c.labels), draws=100)
    assert other.high - other.low > same.high - same.low
