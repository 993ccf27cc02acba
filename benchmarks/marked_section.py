"""The part of a page between two markers, which a benchmark writes and leaves the rest of the page to people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class MarkedSection:
    """What stands between `<!-- made by benchmarks/BENCHMARK.py -->` and the end marker."""

    page: Path
    benchmark: str
    end: str = "<!-- end -->"

    @property
    def begin(self) -> str:
        """The marker before the section."""
        return f"<!-- made by benchmarks/{self.benchmark}.py -->"

    def check(self) -> None:
        """End the program with a line where the page has no place for the section: before minutes of work."""
        text = self.page.read_text("utf-8")
        if any(marker not in text for marker in (self.begin, self.end)):
            raise SystemExit(
                f"{self.benchmark}: {self.page.name} has no place for the table: put {self.begin} and {self.end} there"
            )

    def write(self, text: str) -> None:
        """Replace the section."""
        head, _, rest = self.page.read_text("utf-8").partition(self.begin)
        _, _, tail = rest.partition(self.end)
        self.page.write_text(f"{head}{self.begin}\n\n{text}\n{self.end}{tail}", "utf-8")
