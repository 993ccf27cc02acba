"""Scaffold of a new part: fills a name into templates that work as they are."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from ..errors import UserError

TEMPLATES = Path(__file__).parent / "templates"


def new_method(name: str, folder: Path) -> tuple[Path, str]:
    """Write NAME.py and NAME.toml into the folder; returns the file and the name of the class in it.

    Raises UserError on an invalid name, or where one of the files exists.
    """
    from jinja2 import Environment, StrictUndefined

    stem = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(stem):
        raise UserError(f"a method's name is lower-case words and digits joined by dashes, got {name!r}")
    title = name.replace("-", " ").replace("_", " ")
    words = {"name": "".join(word.capitalize() for word in title.split()), "title": title.capitalize()}
    files = {folder / f"{stem}{suffix}": TEMPLATES / f"method{suffix}.txt" for suffix in (".py", ".toml")}
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already; give another name, or another --out")
    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, template in files.items():
            file.write_text(jinja.from_string(template.read_text("utf-8")).render(words), "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return folder / f"{stem}.py", words["name"]
