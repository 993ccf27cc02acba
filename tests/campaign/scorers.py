"""Faulty scorers and faulty scorer servers: no faulty row becomes a number, no sound row is lost, every gap has a reason."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import faulty
import numpy as np
from fault import NotHeld, Row, one_line, row
from mini_runs import shared_model

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.rendering import RenderedImages
from gpobench.bench.scoring import remote
from gpobench.bench.scoring.remote import Limits, RemoteScorer, connect
from gpobench.bench.scoring.replicas import connect_replicas
from gpobench.bench.scoring.scorers import ask, open_scorer
from gpobench.bench.scoring.worker_setting import WorkerSetting
from gpobench.bench.spec import Prompt, Scores

LIMITS = Limits(images=5, bytes=50_000, pixels=4096)  # requests are cut, and 64 x 64 is the largest image
KINDS = [
    *((kind, "scorer", "all") for kind in faulty.WHOLE),
    *((kind, "scorer", "some") for kind in faulty.SOME),
    *((kind, "server", "all") for kind in faulty.LIES if kind not in faulty.HEALED and kind != "honest"),
    *((kind, "server", "none") for kind in faulty.HEALED),
    *((kind, "picture", "some") for kind in faulty.PICTURES),
    *((kind, "prompt", "some") for kind in faulty.PROMPTS),
    ("fewer prompts than images", "scorer", "all"),
    ("fewer prompts than images", "server", "all"),
    ("an image over the server's limit", "server", "all"),
    ("nobody listens", "server", "all"),
]
# A server that answers so is not at fault as a whole: another one is not asked.
NO_FAILURE = ("honest", "400", "nulls-without-reason", *faulty.HEALED)


class Scorers:
    """The sound scorer, its real server, the faulty ones, and a rig on the miniature model."""

    def __init__(self, place: Path):
        self.place = place

    @cached_property
    def liar(self) -> Any:
        remote.PAUSE = 0.002
        return faulty.Liar()

    @cached_property
    def server(self) -> RemoteScorer:
        served = faulty.served(faulty.Sound(), LIMITS)
        url = served.__enter__()  # until this process ends
        self._keep = served
        return connect(url, timeout=20)

    @cached_property
    def dead(self) -> RemoteScorer:
        mortal = faulty.Liar()
        opened = connect(mortal.url("honest"), timeout=20)
        mortal.close()
        return opened

    @cached_property
    def lying(self) -> dict[str, RemoteScorer]:
        return {}

    @cached_property
    def model(self) -> Any:
        from gpobench.bench.model_spec import Adapter, find_model_spec
        from gpobench.bench.models.open import open_model

        folder = shared_model(self.place.parent / "shared")
        return open_model(find_model_spec(str(folder)), device="cpu", adapter=Adapter(rank=4), seed=0)

    def scorer(self, kind: str, family: str, bad: tuple[int, ...]) -> Any:
        """The scorer or server that does it in the rows `bad`."""
        if family == "scorer" and kind in {**faulty.WHOLE, **faulty.SOME}:
            return faulty.Spoilt({**faulty.WHOLE, **faulty.SOME}[kind], bad)
        if family == "server" and kind in faulty.LIES:
            _ = self.liar
            if kind not in self.lying:
                self.lying[kind] = connect(self.liar.url(kind), timeout=20)
                self.lying[kind].timeout = 0.1 if kind in faulty.SLOW else 20
            return self.lying[kind]
        if kind == "nobody listens":
            _ = self.liar
            return self.dead
        return faulty.Sound() if family == "scorer" else self.server

    def alone(self, kind: str, family: str, extent: str) -> Any:
        """One call of the scorer."""

        def inject(rng: np.random.Generator) -> str:
            from gpobench.bench.training.rig import timed_scores

            n = int(rng.integers(2, 8))
            side = 65 if kind == "an image over the server's limit" else 16
            images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
            prompts = [Prompt(f"number {i}", {"target": "X", "boxes": [[1, 2]]}, "s") for i in range(n)]
            sound = faulty.Sound()(images, prompts)
            bad = _rows(extent, n, rng)
            if family == "prompt":
                prompts = [faulty.PROMPTS[kind] if i in bad else prompt for i, prompt in enumerate(prompts)]
            if kind == "fewer prompts than images":
                prompts = prompts[: int(rng.integers(0, n))]
            with _pictures(kind if family == "picture" else "", bad):
                scores, _ = timed_scores(self.scorer(kind, family, bad), RenderedImages(images), prompts)
            _compare(scores, sound, bad, n)
            return "unscored" if bad else "same"

        return inject

    def one_of_two(self, kind: str) -> Any:
        """A call of two servers, of which the first one answers so."""

        def inject(rng: np.random.Generator) -> str:
            n = int(rng.integers(2, 5))
            images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
            prompts = [Prompt(f"number {i}") for i in range(n)]
            scorer = connect_replicas([self.liar.url(kind), self.server.url], say=lambda line: None)
            for replica in scorer.replicas[:1]:
                if replica.scorer is not None and kind in faulty.SLOW:
                    replica.scorer.timeout = 0.1
            _compare(ask(scorer, images, prompts), faulty.Sound()(images, prompts), (), n)
            return "same"

        return inject

    @cached_property
    def workers(self) -> Any:
        import in_workers

        return open_scorer(f"{in_workers.HERE}:Obedient", workers=WorkerSetting(1))

    def killed(self, times: int) -> Any:
        """A call some of whose images end the worker process that scores them, once or always."""

        def inject(rng: np.random.Generator) -> str:
            import in_workers

            images = rng.integers(1, 256, (5, 16, 16, 3), np.uint8)
            marker = self.place / f"{rng.integers(2**60)}"
            marker.parent.mkdir(parents=True, exist_ok=True)
            prompts = [Prompt(f"number {i}") for i in range(5)]
            prompts[int(rng.integers(5))] = Prompt(f"die-once {marker}" if times == 1 else "die")
            try:
                scores = ask(self.workers, images, prompts)
            except UserError as error:
                one_line(str(error), mention=["ended twice", "scorer.workers=0"])
                return "refused"
            sound = in_workers.Obedient()(images, [Prompt(f"number {i}") for i in range(5)])
            if not np.array_equal(scores.value["mean"], sound.value["mean"]):
                raise NotHeld(f"silent number: {scores.value['mean']} for {sound.value['mean']}")
            return "same"

        return inject

    def in_training(self, kind: str, family: str, extent: str) -> Any:
        """The reward of a rollout: NaN where it failed, and as many errors on the meter."""

        def inject(rng: np.random.Generator) -> str:
            from gpobench.bench.training.rig import MeteredRig

            n, book = 4, [Prompt(f"number {i}") for i in range(4)]
            rig = MeteredRig(self.model, book, faulty.Sound(), Meter(Budget(nfe=1e9)), seed=int(rng.integers(2**31)))
            try:
                x0, prompt_ids = rig.noise(n), rig.prompts(n)
                sound = rig.score(x0, prompt_ids)
                bad = _rows(extent, n, rng)
                rig.scorer = self.scorer(kind, family, bad)
                reward = rig.score(x0, prompt_ids)
                if reward.isnan().nonzero().flatten().tolist() != list(bad):
                    raise NotHeld(f"silent number: rows {bad} failed, rewards {reward.tolist()}")
                if not bool((reward[~reward.isnan()] == sound[~reward.isnan()]).all()):
                    raise NotHeld(f"silent number: a sound row changed, {reward.tolist()} for {sound.tolist()}")
                if rig.meter.errors != len(bad) or not all(why.strip() for why in rig.failures):
                    raise NotHeld(f"wrong outcome: {rig.meter.errors} errors counted of {len(bad)}")
            finally:
                rig.close()
            return "unscored" if bad else "same"

        return inject

    def writes_on_its_images(self, rng: np.random.Generator) -> str:
        """A scorer that writes on what it is given changes no other scorer's input."""
        from gpobench.bench.training.rig import timed_scores

        class Writes(faulty.Sound):
            def __call__(self, images: Any, prompts: Any) -> Scores:
                images[:] = 0
                return faulty.Sound()(images, prompts)

        images = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
        before = images.copy()
        scores, _ = timed_scores(Writes(), RenderedImages(images), [Prompt("x")] * 3)
        if not np.array_equal(images, before):
            raise NotHeld("silent number: the scorer changed the images that the next scorer gets")
        if np.isfinite(np.asarray(scores.value["mean"])).any():
            raise NotHeld("silent number: the scores of overwritten images")
        return "unscored"


def _rows(extent: str, n: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The rows of n that the fault costs."""
    if extent == "some":
        return tuple(sorted(rng.choice(n, int(rng.integers(1, n)), replace=False).tolist()))
    return tuple(range(n)) if extent == "all" else ()


class _pictures:
    """Until the end of the block the rows `bad` are sent as something else than a PNG of the image."""

    def __init__(self, kind: str, bad: tuple[int, ...]):
        self.kind, self.bad, self.sent = kind, bad, 0

    def __enter__(self) -> None:
        def png(image: Any) -> bytes:
            broken = self.kind and self.sent in self.bad
            self.sent += 1
            return faulty.PICTURES[self.kind](image) if broken else faulty.PNG(image)

        self.real, remote.encode_png = remote.encode_png, png

    def __exit__(self, *_: object) -> None:
        remote.encode_png = self.real


def _compare(scores: Scores, sound: Scores, bad: tuple[int, ...], n: int) -> None:
    mean = np.asarray(scores.value["mean"], dtype=np.float64)
    if mean.shape != (n,):
        raise NotHeld(f"silent number: {n} images have scores of shape {mean.shape}")
    if np.flatnonzero(~np.isfinite(mean)).tolist() != list(bad) or np.isinf(mean).any():
        raise NotHeld(f"silent number: rows {bad} failed, scores {mean.tolist()}")
    good = [i for i in range(n) if i not in bad]
    if not np.array_equal(mean[good], np.asarray(sound.value["mean"])[good]):
        raise NotHeld(f"silent number: a sound row changed, {mean.tolist()}")
    if any(not str(scores.reasons.get(i, "")).strip() for i in bad):
        raise NotHeld(f"wrong outcome: a row without a reason, {dict(scores.reasons)}")


def rows(place: Path) -> list[Row]:
    scorers = Scorers(place)
    made: list[Row] = []
    for kind, family, extent in KINDS:
        expected = "same" if extent == "none" else "unscored"
        weight = 0.02 if kind in faulty.SLOW else 0.3 if kind == "endless" else 1.0
        more: dict[str, Any] = {"weight": weight, "seconds": 60.0}
        where = {
            "scorer": "a scorer",
            "server": "a scorer's server",
            "picture": "an image sent",
            "prompt": "a prompt sent",
        }
        made.append(row("scorers", kind, where[family], expected, scorers.alone(kind, family, extent), **more))
        if family == "scorer" and kind in {**faulty.WHOLE, **faulty.SOME}:
            made.append(
                row(
                    "scorers",
                    kind,
                    "the reward of a rollout",
                    expected,
                    scorers.in_training(kind, family, extent),
                    **more,
                )
            )
    for kind in faulty.LIES:
        if kind not in NO_FAILURE:
            weight = 0.02 if kind in faulty.SLOW else 0.3
            made.append(row("scorers", kind, "one of two servers", "same", scorers.one_of_two(kind), weight=weight))
    for what, times, outcome in (("is killed once", 1, "same"), ("is killed again", 2, "refused")):
        made.append(row("scorers", what, "a worker process", outcome, scorers.killed(times), weight=0.3, seconds=300.0))
    made.append(row("scorers", "writes on its images", "a scorer", "unscored", scorers.writes_on_its_images))
    return made
