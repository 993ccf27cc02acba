"""Budget and meter: no charge, in whatever order, passes a bound."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.budget import CURRENCIES, Budget, Meter, Spent, load_budget, named_budgets
from gpobench.bench.errors import UserError

amount = st.integers(1, 40)
spends = st.one_of(
    st.tuples(st.just("nfe"), amount),
    st.tuples(st.just("images"), amount),
    st.tuples(st.just("updates"), amount),
    st.tuples(st.just("reward_calls"), amount),
)


def spend(meter: Meter, currency: str, n: int) -> None:
    if currency == "reward_calls":
        meter.charge_scorer("judge", n)
    else:
        meter.charge(role="rollout", **{currency: n})


@given(
    bounds=st.dictionaries(st.sampled_from(["nfe", "images", "updates", "reward_calls", "flops"]), amount, min_size=1),
    charges=st.lists(spends, max_size=30),
)
def test_no_currency_passes_its_bound(bounds: dict[str, int], charges: list[tuple[str, int]]) -> None:
    meter = Meter(Budget(**bounds), flops_a_forward=2.5)
    held = dict.fromkeys(CURRENCIES, 0.0)
    for currency, n in charges:
        would = {currency: held[currency] + n} | ({"flops": held["flops"] + 2.5 * n} if currency == "nfe" else {})
        passed = {c for c, total in would.items() if c in bounds and total > bounds[c]}
        try:
            spend(meter, currency, n)
            assert not passed
            held |= would
        except Spent as spent:  # before the spend, for a reason, and nothing was taken
            assert spent.currency in passed
        counted = {c: v for c, v in meter.spent().items() if c != "seconds"}
        assert counted == {c: v for c, v in held.items() if c != "seconds"}
        assert all(counted[c] <= bound for c, bound in bounds.items())
        assert 0 <= meter.fraction() <= 1


def test_a_charge_in_two_currencies_is_all_or_nothing() -> None:
    meter = Meter(Budget(nfe=100, images=3))
    with pytest.raises(Spent, match="images"):
        meter.charge(nfe=10, role="rollout", images=4)
    assert meter.nfe == 0 and meter.images == 0


def test_the_bound_itself_may_be_spent() -> None:
    meter = Meter(Budget(nfe=10))
    meter.charge(nfe=10, role="rollout")
    assert meter.fraction() == 1
    with pytest.raises(Spent):
        meter.charge(nfe=1, role="ref")
    meter.charge(updates=1)  # a currency without a bound


def test_nfe_is_counted_by_role() -> None:
    meter = Meter(Budget(nfe=100))
    meter.charge(nfe=3, role="rollout")
    meter.charge(nfe=5, role="policy")
    meter.charge(nfe=2, role="rollout")
    assert dict(meter.roles) == {"rollout": 5, "policy": 5} and meter.nfe == 10


def test_the_clock_stands_while_stopped() -> None:
    meter = Meter(Budget(seconds=100))
    assert meter.seconds == 0
    meter.start()
    meter.start()  # twice is once
    time.sleep(0.02)
    meter.stop()
    ran = meter.seconds
    time.sleep(0.05)
    assert meter.seconds == ran >= 0.02
    meter.start()
    time.sleep(0.01)
    assert meter.seconds > ran


def test_no_time_left_refuses_every_charge() -> None:
    meter = Meter(Budget(seconds=0.01))
    meter.start()
    time.sleep(0.02)
    for currency in ("nfe", "images", "updates", "reward_calls"):
        with pytest.raises(Spent, match="seconds"):
            spend(meter, currency, 1)
    assert meter.nfe == meter.images == meter.updates == meter.reward_calls == 0
    assert meter.fraction() == 1


@given(st.lists(spends, max_size=20))
def test_a_meter_survives_its_checkpoint(charges: list[tuple[str, int]]) -> None:
    meter = Meter(Budget(nfe=10_000), flops_a_forward=3)
    meter.start()
    for currency, n in charges:
        spend(meter, currency, n)
    meter.charge_stated({"nfe": 7, "images": 2, "reward_calls": 1})
    meter.note_scorer("judge", 0.5, 2)
    meter.stop()
    other = Meter(Budget(nfe=10_000), flops_a_forward=3)
    other.restore(json.loads(json.dumps(meter.state())))  # as it lies on disk
    assert other.state() == meter.state() and other.spent() == meter.spent() and other.errors == 2
    other.charge(nfe=1, role="rollout")  # the copy is its own
    assert other.nfe == meter.nfe + 1 and other.stated == {"nfe": 7, "images": 2, "reward_calls": 1}


@pytest.mark.parametrize("amount", [-1, -150, True, 1.0, 2.5, float("nan"), float("inf"), "5", None])
def test_a_charge_that_is_no_whole_number_from_zero_up_is_an_error(amount: Any) -> None:
    meter = Meter(Budget(nfe=100))
    meter.charge(nfe=50, images=5, updates=2, role="rollout")
    before = meter.state()
    for currency in ("nfe", "images", "updates"):
        with pytest.raises(ValueError, match=f"a charge of {currency}"):
            meter.charge(role="rollout", **{currency: amount})
    with pytest.raises(ValueError, match="a charge of reward_calls"):
        meter.charge_scorer("judge", amount)
    with pytest.raises(ValueError, match="a charge of nfe"):
        meter.charge_stated({"nfe": amount})
    with pytest.raises(ValueError, match="a charge of errors"):
        meter.note_scorer("judge", 0.0, amount)
    assert meter.state() == before


def test_what_a_meter_shows_cannot_be_written_back() -> None:
    meter: Any = Meter(Budget(nfe=100))
    meter.charge(nfe=50, role="rollout")
    meter.charge_scorer("judge", 3)
    meter.roles.clear()
    meter.scorers["judge"]["calls"] = 0
    assert meter.nfe == 50 and meter.reward_calls == 3
    for name in ("roles", "scorers", "images", "updates", "nfe", "budget", "seconds", "stated"):
        with pytest.raises(AttributeError):
            setattr(meter, name, 0)
    with pytest.raises(ValueError, match="begun to count"):
        meter.restore(Meter(Budget(nfe=100)).state())


def test_the_clock_runs_whatever_becomes_of_the_time_module(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(Budget(nfe=1))
    meter.start()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    time.sleep(0.01)
    assert meter.seconds >= 0.01


def test_images_and_the_calls_that_score_them_are_charged_together_or_not_at_all() -> None:
    meter = Meter(Budget(reward_calls=3))
    with pytest.raises(Spent, match="reward_calls"):
        meter.charge_scorer("judge", 4, images=4)
    assert meter.images == meter.reward_calls == 0


@pytest.mark.parametrize("currency", CURRENCIES)
@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf")])
def test_only_a_finite_number_above_zero_is_a_bound(currency: str, bound: float) -> None:
    table: dict[str, Any] = {currency: bound}
    with pytest.raises(UserError, match=f"{currency} must be a finite number above zero, got {bound:g}"):
        Budget(**table)
    with pytest.raises(UserError, match="above zero"):
        load_budget(f"{currency}={bound}")


def test_a_budget_without_a_bound_is_none() -> None:
    with pytest.raises(UserError, match="at least one bound"):
        Budget()


def test_budgets_come_by_name_file_and_text(tmp_path: Path) -> None:
    assert {"tiny", "sd35m"} <= set(named_budgets())
    for name in named_budgets():
        assert load_budget(name).bounds() and load_budget(name).name == name
    file = tmp_path / "mine.toml"
    file.write_text("nfe = 100\nseconds = 2.5\n")
    assert (
        load_budget(str(file)).bounds() == load_budget("nfe=100, seconds=2.5").bounds() == {"nfe": 100, "seconds": 2.5}
    )


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("tinny", "unknown budget 'tinny'; did you mean 'tiny'?"),
        ("nf=5", "unknown currency 'nf'; did you mean 'nfe'?"),
        ("nfe=lots", "'nfe=lots' is not currency=number"),
        ("nfe=1,images", "'images' is not currency=number"),
        ("nowhere.toml", "nowhere.toml"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused(reference: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_budget(reference)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("nfe = ", "budget"), ('nfe = "many"', "nfe must be a number"), ("nfe = true", "nfe must be a number"),
     ("nfes = 5", "did you mean 'nfe'?"), ("[nfe]\nx = 1", "nfe must be a number"), ("", "at least one bound")],
)  # fmt: skip
def test_a_bad_budget_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_budget(str(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_budget_file_of_bytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bytes.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bytes.toml"):
        load_budget(str(file))
