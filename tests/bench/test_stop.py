"""Once is a request, twice is an order, and afterwards the keys are as they were."""

from __future__ import annotations

import os
import signal

import pytest

from gpobench.bench.stop import AtOnce, asked_to_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
