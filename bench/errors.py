"""Exceptions of gpobench: a wrong request, a missing part, a run that the user stopped; any exception as one line."""

# Exit codes beside 0; 1 is each command's own.
USER_ERROR, NO_RESULT, STOPPED = 2, 3, 130  # NO_RESULT: a run is complete, but ended by a fault or is invalid


class UserError(Exception):
    """A request that cannot be met. Its text is one line that says what to change (exit code 2)."""


class Missing(UserError):
    """An optional package, engine or weight file that is not there. Its text names what to install or fetch."""


class DownloadLimitExceeded(Exception):
    """Files of more bytes were requested than a download log allows: the part that asks for them is examined no further."""


class Interrupted(Exception):
    """The user stopped the run; everything up to the last complete iteration is on disk."""


def error_line(error: BaseException) -> str:
    """Return type and text of an exception in one line; the text may be made by third-party code, which may fail."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
