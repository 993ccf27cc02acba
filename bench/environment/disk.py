"""Disk: refuses downloads that would fill it, and formats sizes."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..files import MIN_FREE_DISK, free_disk


def require_free_disk(path: Path, needed: float, what: str) -> None:
    """Raise UserError where the disk of a path, which need not exist, has too little room for so many bytes of `what`."""
    path, free = free_disk(path)
    if needed and free < needed + MIN_FREE_DISK:
        raise UserError(f"{what} takes {format_size(needed)}, and the disk at {path} has {format_size(free)} free")


def format_size(n: float) -> str:
    """Return a number of bytes in GB (2^30 bytes) or, below a tenth of one, in MB."""
    return f"{n / 2**30:.1f} GB" if n >= 2**30 / 10 else f"{n / 2**20:.1f} MB"
