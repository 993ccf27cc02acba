"""A scorer served by several servers: each call goes to one that is free, and a server that fails is left out for a while.

A call is sent whole, in the requests that a single server would get, so which server answers changes no score. All must serve
the scorer of one id.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..spec import Images, Prompt, Scores
from ..text import printable
from .remote import RemoteScorer, connect, server_address

RETRY = 30.0  # s for which a server that failed is left out


@dataclass(eq=False)
class Replica:
    """One of the servers."""

    url: str
    scorer: RemoteScorer | None  # None: it never answered
    out_until: float = 0.0  # on the monotonic clock
    busy: bool = False


def _print_line(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


class ReplicatedScorer:
    """Calls one of several servers of a scorer; safe to call from several threads. NaN with a reason where none answers."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        connected: Callable[[str], RemoteScorer],
        say: Callable[[str], None] = _print_line,
    ) -> None:
        """Keep the servers.

        Args:
            replicas: at least one of them answered.
            connected: connects to a URL; UserError where it does not answer.
            say: called with a line when a server is left out, and when it is back.
        """
        first = next(replica.scorer for replica in replicas if replica.scorer is not None)
        self.id, self.name, self.metrics, self.reference = first.id, first.name, first.metrics, first.reference
        self.replicas, self._connected, self._say = replicas, connected, say
        self._changed = threading.Condition()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to every metric (B,); NaN with a reason where no server gives a number."""
        tried: list[Replica] = []
        scores: Scores | None = None
        while (replica := self._take(tried)) is not None:
            tried.append(replica)
            why = ""
            try:
                if (scorer := self._usable(replica)) is not None:
                    scores, why = scorer.attempt(images, prompts)
                    if not why:
                        return scores
            finally:
                self._give_back(replica, why)
        if scores is None:
            raise ConnectionError(f"none of {', '.join(replica.url for replica in self.replicas)} answers")
        return scores

    def _take(self, tried: Sequence[Replica]) -> Replica | None:
        """Wait for a free server that was not tried in this call; None where there is no other.

        Those left out are tried when their time is over, or when no other is left.
        """
        with self._changed:
            while True:
                others = [replica for replica in self.replicas if replica not in tried]
                in_use = [replica for replica in others if replica.out_until <= time.monotonic()]
                candidates = in_use or others
                free = [replica for replica in candidates if not replica.busy]
                if not candidates or free:
                    break
                self._changed.wait(1.0)
            if not free:
                return None
            free[0].busy = True
            return free[0]

    def _usable(self, replica: Replica) -> RemoteScorer | None:
        """The server's scorer; one that was left out is asked first whether it is back, and what it serves."""
        if replica.scorer is not None and not replica.out_until:
            return replica.scorer
        try:
            scorer = self._connected(replica.url)
            if scorer.id != self.id:
                raise UserError(f"the scorer server at {replica.url} serves {scorer.id}, the others {self.id}")
        except UserError:
            replica.out_until = time.monotonic() + RETRY
            return None
        replica.scorer, replica.out_until = scorer, 0.0
        self._say(f"{self.name}: the server at {replica.url} scores again")
        return scorer

    def _give_back(self, replica: Replica, why: str) -> None:
        if why:
            replica.out_until = time.monotonic() + RETRY
            self._say(f"{self.name}: the server at {replica.url} is left out for {RETRY:g} s: {why}")
        with self._changed:
            replica.busy = False
            self._changed.notify_all()


def connect_replicas(
    urls: Sequence[str], *, token: str = "", timeout: float = 60.0, say: Callable[[str], None] = _print_line
) -> ReplicatedScorer:
    """Connect to several servers of one scorer; one that does not answer is left out, with a line, until it does.

    Args:
        urls: of the servers.
        token: of all of them.
        timeout: seconds a request may take.
        say: called with a line when a server is left out, and when it is back.

    Raises:
        UserError: where one is no URL, none answers, or they serve different scorers.
    """
    for url in urls:
        server_address(url)
    connected: Callable[[str], RemoteScorer] = lambda url: connect(url, token=token, timeout=timeout)
    replicas: list[Replica] = []
    refusals: list[UserError] = []
    for url in urls:
        try:
            replicas.append(Replica(url, connected(url)))
        except UserError as error:
            replicas.append(Replica(url, None, time.monotonic() + RETRY))
            refusals.append(error)
    scorers = [replica.scorer for replica in replicas if replica.scorer is not None]
    if not scorers:
        raise refusals[0]
    for replica in replicas:
        if replica.scorer is not None and replica.scorer.id != scorers[0].id:
            raise UserError(
                f"the server at {replica.url} serves {replica.scorer.id}, another one {scorers[0].id}: "
                "servers of one scorer have the same rule, engine and weights"
            )
    for refusal in refusals:
        say(f"{refusal}; the other servers score without it")
    return ReplicatedScorer(replicas, connected, say)
