"""Ctrl-C: once asks for a stop, twice stops at once, and the handlers are restored afterwards."""

from __future__ import annotations

import io
import os
import signal

import pytest

from gpobench.bench.signals import AtOnce, asked_to_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_heard_the_second_ends_and_the_old_handler_returns(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(AtOnce), asked_to_stop() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped() and "stopping after the step at hand" in capsys.readouterr().err
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asked_to_stop() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_dead_pipe_does_not_turn_a_stop_into_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Dead())
    with asked_to_stop() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
