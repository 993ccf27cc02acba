"""Reads the words of the embedded model's prompts, and assigns each to a split by its spelling."""

from pathlib import Path

from .glyphs import split_of

WORD_LIST = Path(__file__).with_name("ocr_words.txt")  # one word a line, 3 to 5 capitals


def read_word_list() -> list[str]:
    """Read every word, in the order of the file."""
    return WORD_LIST.read_text("ascii").split()


def word_splits() -> dict[str, list[str]]:
    """Return the words of the train, validation and test split; only those of the train split may be drawn in training images."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in read_word_list():
        splits[split_of(word)].append(word)
    return splits
