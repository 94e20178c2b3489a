"""What the jobs are told that blend shards."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from fractions import Fraction
from typing import Any

from snaketron.config import ChatSource, Config, Corpus, Section
from snaketron.config.base import Mixed
from snaketron.config.data import Split
from snaketron.settings import unless


class BlendSettings(Section):
    """What, with the packed shards, defines the blend of SFT."""

    weights: dict[str, Mixed]  # of corpora or sources of conversations, by name; they need not sum to 1
    splits: dict[str, Split] = unless({})  # of those that are of one split as a whole

    def of_split(self, split: str) -> dict[str, float]:
        """The weights of what may be in a split."""
        return {
            name: weight for name, weight in self.weights.items() if self.splits.get(name, split) == split
        }


class PhaseSettings(BlendSettings):
    """What, with the tokenized shards and the tokenizer, defines the blend of a phase."""

    phase: str
    train_tokens: int  # of the phase, in whole steps


def shares(weights: Mapping[str, float], held_out: Container[str] = ()) -> dict[str, float]:
    """The weights of a blend as shares of it, which are those of any other weights in the same proportions.

    What is held out takes no share of the training: its weight is in proportion to the others.

    >>> shares({"docs": 5, "code": 3, "web": 2}) == shares({"docs": 0.5, "code": 0.3, "web": 0.2})
    True
    >>> shares({"docs": 5, "code": 5, "mine": 10}, held_out={"mine"})
    {'docs': 0.5, 'code': 0.5, 'mine': 1.0}
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # floats may sum to less than 1
    total = sum(weight for name, weight in exact.items() if name not in held_out)
    return {name: float(weight / total) for name, weight in exact.items()}


def _told(weights: Mapping[str, float], sources: Sequence[Corpus | ChatSource]) -> dict[str, Any]:
    """What settings of a blend have of the weights in the configuration, and of the sources there are."""
    held_out = {source.name for source in sources if not source.trained}
    splits = {source.name: source.split for source in sources if source.split and source.name in weights}
    return {"weights": shares(weights, held_out), "splits": splits}


def blend_settings(config: Config) -> BlendSettings:
    return BlendSettings(**_told({entry.source: entry.weight for entry in config.sft.blend}, config.chats))


def phase_settings(config: Config, name: str) -> PhaseSettings:
    (phase,) = (phase for phase in config.pretrain.phases if phase.name == name)
    return PhaseSettings(
        **_told({entry.corpus: entry.weight for entry in phase.blend}, config.corpora),
        phase=name,
        train_tokens=config.training(f"pretrain/{name}").tokens,
    )
