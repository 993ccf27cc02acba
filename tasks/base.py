"""Abstract base of the tasks here: the settings of each prompt domain in one table, and checks of split and domain.

A prompt domain says what a model's prompts look like: `glyphs` are those of the embedded 64x32 model, `open` those of real models.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..bench import registry
from ..bench.registry import known_domain
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DomainSettings:
    """How a task is trained on and evaluated in one prompt domain."""

    reward: str  # the scorer that methods train on
    held_out: Sequence[str]  # the scorers that every run needs and no method trains on
    key: str  # scorer/metric of one of them by which tables rank: the graded metric, which tells more apart than a verdict
    columns: Columns  # quality, diversity and drift
    evaluation: EvaluationSettings
    optional: Sequence[str] = ()  # more scorers, left out of a run where they are not installed


class DomainTask(ABC):
    """A task of two prompt domains: subclasses are final, and state the domains' settings and the prompts."""

    name: str
    version: str

    @abstractmethod
    def domains(self) -> Mapping[str, DomainSettings]:
        """The settings of each prompt domain."""

    @abstractmethod
    def split_prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """The prompts of a split, of a known domain; UserError where a published list cannot be had."""

    def reward(self, domain: str) -> str:
        """The scorer that methods train on."""
        return self._settings(domain).reward

    def held_out(self, domain: str) -> Sequence[str]:
        """The scorers that every run needs and no method trains on."""
        return self._settings(domain).held_out

    def key(self, domain: str) -> str:
        """The `SCORER/METRIC` by which tables rank."""
        return self._settings(domain).key

    def scorers(self, domain: str) -> Sequence[str]:
        """All scorers of the evaluation: the reward, those held out, and optional ones."""
        settings = self._settings(domain)
        return [settings.reward, *settings.held_out, *settings.optional]

    def columns(self, domain: str) -> Columns:
        """Scorers of quality and embedders of diversity and drift, shown beside the task's own scorers."""
        return self._settings(domain).columns

    def evaluation(self, domain: str) -> EvaluationSettings:
        """How many images per prompt an evaluation takes."""
        return self._settings(domain).evaluation

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """The prompts of a split; UserError for an unknown split or domain, or where a published list cannot be had."""
        if split not in SPLITS:
            raise registry.unknown("split", split, SPLITS)
        return self.split_prompts(split, known_domain(self.name, domain))

    def _settings(self, domain: str) -> DomainSettings:
        return self.domains()[known_domain(self.name, domain)]
