"""Two errors a person can mend: a wrong request, and a missing part."""


class UserError(Exception):
    """A request that cannot be met as it stands; its text is one line a person can act on (exit code 2)."""


class Missing(UserError):
    """An optional package or engine that is not installed; the text names what to install."""
