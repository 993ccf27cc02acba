"""Worker processes: the scores of any number of them are those of this process, and whatever ends one is a line or a reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench import signals
from gpobench.bench.assets.glyphs import draw_word
from gpobench.bench.errors import UserError
from gpobench.bench.scoring import worker_pool
from gpobench.bench.scoring.calls import SECONDS
from gpobench.bench.scoring.scorers import InProcessScorer, ask, calls_at_once, close_scorers, open_scorer
from gpobench.bench.scoring.worker_pool import WorkerScorer, WorkersFailed
from gpobench.bench.scoring.worker_setting import CORES, WORKERS, WorkerSetting, automatic_count, cores
from gpobench.bench.signals import AtOnce
from gpobench.bench.spec import Prompt, Scores

OBEDIENT = f"{Path(__file__).parents[2] / 'in_workers.py'}"


def pictures(*texts: str) -> tuple[np.ndarray, list[Prompt]]:
    rng = np.random.default_rng(len(texts))
    return rng.integers(0, 256, (len(texts), 16, 24, 3), np.uint8), [Prompt(text, {"a": [1]}) for text in texts]


def same(a: Scores, b: Scores) -> None:
    assert list(a.value) == list(b.value) and all(a.value[m].tobytes() == b.value[m].tobytes() for m in a.value)
    assert dict(a.reasons) == dict(b.reasons) and list(a.notes or ()) == list(b.notes or ())


@pytest.fixture(scope="module")
def here() -> Any:
    return open_scorer(f"{OBEDIENT}:Obedient")


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerScorer]:
    """Two processes, of which those start that are needed."""
    scorer = open_scorer(f"{OBEDIENT}:Obedient", workers=WorkerSetting(2))
    assert isinstance(scorer, WorkerScorer)
    yield scorer
    close_scorers([scorer])


def running(scorer: WorkerScorer) -> list[int]:
    assert scorer.pool is not None
    return [worker.pid for worker in scorer.pool.workers if worker.pid]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ends(pid: int, seconds: float = 60) -> bool:
    limit = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not alive(pid)


# The scores


def test_the_scores_of_one_and_three_workers_are_those_of_none() -> None:
    """With the real engine, on worn words of which some are misread: every metric, note and reason, bit by bit.

    Two workers are what the tests below have.
    """
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("ABCDEFGHIJKLMNOPRSTUVW"), 5)) for _ in range(21)]
    images = np.stack([draw_word(word) for word in words]).astype(np.float64)
    images = np.clip(images + rng.normal(size=images.shape) * 60, 0, 255).astype(np.uint8)
    images[::3] = images[::3, :, ::-1]  # mirrored: read in part
    prompts = [Prompt(f'a sign that says "{word}"') for word in words]
    whole = ask(open_scorer("rapidocr"), images, prompts)
    assert len(set(whole.value["soft"])) > 3 and not whole.reasons
    for count in (1, 3):
        scorer = open_scorer("rapidocr", workers=WorkerSetting(count))
        try:
            assert isinstance(scorer, WorkerScorer)
            same(ask(scorer, images, prompts), whole)
        finally:
            close_scorers([scorer])


@pytest.mark.parametrize(
    "texts",
    [
        ("a", "b", "c", "d", "e"),
        ("a",),
        ("a", "b", "c", "refuse", "e"),
        ("a", "b", "c", "raise", "e"),
        ("a", "b", "exit", "d", "raise"),
        ("a", "b", "raise", "d", "exit"),
        (),
    ],
)
def test_a_call_is_as_in_this_process_whatever_the_scorer_raises(
    here: Any, workers: WorkerScorer, texts: tuple[str, ...]
) -> None:
    images, prompts = pictures(*texts)
    images[1:2] = 0  # has no score
    same(ask(workers, images, prompts), ask(here, images, prompts))
    assert (workers.id, workers.name, workers.metrics) == (here.id, here.name, here.metrics)


def test_calls_from_several_threads_are_kept_apart(here: Any, workers: WorkerScorer) -> None:
    batches = [pictures(*(f"{n}-{i}" for i in range(n))) for n in (1, 5, 8, 3)]
    results: dict[int, Scores] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.__setitem__(k, ask(workers, *batches[k])))
        for k in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, batch in enumerate(batches):
        same(results[k], ask(here, *batch))


def test_images_of_another_size_follow_and_facts_that_cannot_be_sent_are_a_reason(
    here: Any, workers: WorkerScorer
) -> None:
    for side in (8, 200, 16):
        images = np.random.default_rng(side).integers(0, 256, (3, side, side, 3), np.uint8)
        same(ask(workers, images, [Prompt("x")] * 3), ask(here, images, [Prompt("x")] * 3))
    images, _ = pictures("x", "y")
    scores = ask(workers, images, [Prompt("x", {"f": lambda: 0}), Prompt("y")])
    assert np.isnan(scores.value["mean"]).all() and set(scores.reasons) == {0, 1}


# Which scorers, how many


def test_a_scorer_that_does_not_support_workers_stays_in_this_process() -> None:
    assert isinstance(open_scorer("reader", workers=WorkerSetting(2)), InProcessScorer)
    cheap = open_scorer("rapidocr", workers=WorkerSetting(2, automatic=True))
    assert isinstance(cheap, InProcessScorer) and calls_at_once(cheap) == 1
    page = open_scorer("rapidocr:page", workers=WorkerSetting(3, automatic=True))
    blend = open_scorer("rapidocr:page*0.5+reader", workers=WorkerSetting(3, automatic=True))
    try:
        assert isinstance(page, WorkerScorer) and calls_at_once(page) == 2
        assert calls_at_once(blend) == 1
        assert not running(page)  # none before it is needed
    finally:
        close_scorers([page, blend])
    assert page.pool is None


@pytest.mark.parametrize("value", [1000, -1, "many", True, 2.0, [2], "1000", ""])
def test_a_setting_that_is_none_is_refused_in_one_line(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^scorer.workers is 'auto' or a number of processes from 0 to \d+") as raised:
        WorkerSetting.parse(value)
    assert "\n" not in str(raised.value)
    if isinstance(value, str) and value:
        monkeypatch.setenv(WORKERS, value)
        with pytest.raises(UserError, match=f"^{WORKERS} is"):
            WorkerSetting.parse()


def test_by_itself_it_takes_the_cores_that_the_sampler_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKERS, raising=False)
    for have, jobs, ranks, want in ((1, "", "", 0), (2, "", "", 0), (3, "", "", 1), (6, "", "", 4), (64, "", "", 8),
                                    (16, "4", "", 2), (16, "", "4", 2), (16, "4", "2", 0), (4, "16", "x", 2)):  # fmt: skip
        monkeypatch.setattr("gpobench.bench.scoring.worker_setting.cores", lambda have=have: have)
        monkeypatch.setenv(CORES, jobs)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert automatic_count() == want
        assert WorkerSetting.parse() == WorkerSetting(want, automatic=True) == WorkerSetting.parse("auto")
    monkeypatch.setenv(WORKERS, "3")
    assert WorkerSetting.parse() == WorkerSetting(3) != WorkerSetting.parse(2)
    assert cores() >= 1


# What ends a worker


def test_a_killed_worker_is_replaced_and_its_images_are_scored_again(
    here: Any, workers: WorkerScorer, tmp_path: Path
) -> None:
    images, prompts = pictures("a", "b", f"die-once {tmp_path / 'died'}", "d", "e")
    scores = ask(workers, images, prompts)
    assert (tmp_path / "died").exists()
    same(scores, ask(here, images, prompts))
    for pid in running(workers):  # also between two calls
        os.kill(pid, signal.SIGKILL)
        assert ends(pid)
    same(ask(workers, images, prompts), scores)


def test_images_that_end_two_workers_stop_what_asked_with_one_line(here: Any, workers: WorkerScorer) -> None:
    images, prompts = pictures("a", "b", "die", "d")
    with pytest.raises(
        WorkersFailed, match="ended twice on the same images .killed by SIGKILL.*scorer.workers=0"
    ) as raised:
        ask(workers, images, prompts)
    assert "\n" not in str(raised.value)
    same(ask(workers, *pictures("a", "b", "c")), ask(here, *pictures("a", "b", "c")))


def test_a_worker_that_hangs_is_ended_at_the_time_limit_and_the_next_call_has_another(
    here: Any, workers: WorkerScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ask(workers, *pictures("process")).notes
    monkeypatch.setenv(SECONDS, "1")
    stuck = ask(workers, *pictures("hang"))
    assert stuck.reasons == {0: f"obedient: TimeoutError: no answer within 1 s ({SECONDS} sets the limit)"}
    assert before and ends(int(before[0]))
    monkeypatch.delenv(SECONDS)
    same(ask(workers, *pictures("a")), ask(here, *pictures("a")))


def test_after_ctrl_c_a_worker_that_does_not_answer_is_not_waited_for(workers: WorkerScorer) -> None:
    notes = ask(workers, *pictures("process")).notes
    timer = threading.Timer(1.0, lambda: signals._give_up_after(0))  # pyright: ignore[reportPrivateUsage]
    timer.start()
    try:
        with pytest.raises(AtOnce):
            ask(workers, *pictures("hang"))
    finally:
        timer.join()
        signals._give_up_after(float("inf"))  # pyright: ignore[reportPrivateUsage]
    assert notes and ends(int(notes[0]))


@pytest.mark.parametrize(("name", "says"), [("OnlyHere", "no display"), ("Drifting", "its id is obedient-True, not")])
def test_a_scorer_that_is_another_one_in_a_worker_stops_what_asked_with_one_line(name: str, says: str) -> None:
    scorer = open_scorer(f"{OBEDIENT}:{name}", workers=WorkerSetting(1))
    try:
        with pytest.raises(WorkersFailed, match=f"does not open in a worker process: .*{says}.*scorer.workers=0"):
            ask(scorer, *pictures("a"))
    finally:
        close_scorers([scorer])


def test_without_room_in_shared_memory_it_says_what_to_do(
    workers: WorkerScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(worker_pool.shutil, "disk_usage", lambda _: Full)
    images = np.zeros((2, 600, 600, 3), np.uint8)
    with pytest.raises(WorkersFailed, match="has 0 MB free, and a worker's images take 2 MB.*scorer.workers=0"):
        ask(workers, images, [Prompt("x")] * 2)


def test_the_last_scorer_that_is_closed_ends_the_processes_and_removes_their_memory() -> None:
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    first, second = (open_scorer(f"{OBEDIENT}:Obedient", workers=WorkerSetting(1)) for _ in range(2))
    assert isinstance(first, WorkerScorer) and isinstance(second, WorkerScorer) and first.pool is second.pool
    ask(first, *pictures("a", "b", "c"))
    (pid,) = running(second)
    close_scorers([first])
    assert alive(pid)
    close_scorers([second, second])
    assert ends(pid)
    if before:
        assert set(os.listdir("/dev/shm")) <= before
    assert "was closed" in ask(second, *pictures("a")).reasons[0]


def test_closing_ends_a_worker_in_the_middle_of_a_call() -> None:
    scorer = open_scorer(f"{OBEDIENT}:Obedient", workers=WorkerSetting(1))
    assert isinstance(scorer, WorkerScorer)
    notes = ask(scorer, *pictures("process")).notes
    raised: list[BaseException] = []

    def call() -> None:
        try:
            ask(scorer, *pictures("hang"))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    close_scorers([scorer])
    thread.join(60)
    assert notes and ends(int(notes[0])) and [type(error) for error in raised] == [AtOnce]


ORPHAN = """
import os, signal, sys
import numpy as np
from gpobench.bench.scoring.scorers import ask, open_scorer
from gpobench.bench.scoring.worker_setting import WorkerSetting
from gpobench.bench.spec import Prompt
scorer = open_scorer(sys.argv[1], workers=WorkerSetting(1))
print(ask(scorer, np.ones((1, 8, 8, 3), np.uint8), [Prompt("process")]).notes[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, f"{OBEDIENT}:Obedient"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == -signal.SIGKILL and ends(int(done.stdout))
