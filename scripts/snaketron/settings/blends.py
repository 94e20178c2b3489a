"""What the jobs are told that blend shards."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from snaketron.config import Config, Section
from snaketron.config.base import Mixed


class BlendSettings(Section):
    """What, with the packed shards, defines the blend of SFT."""

    weights: dict[str, Mixed]  # of corpora or sources of conversations, by name; they need not sum to 1


class PhaseSettings(BlendSettings):
    """What, with the tokenized shards and the tokenizer, defines the blend of a phase."""

    phase: str
    train_tokens: int  # of the phase, in whole steps


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of a blend as shares of it, which are those of any other weights in the same proportions.

    >>> shares({"docs": 5, "code": 3, "web": 2}) == shares({"docs": 0.5, "code": 0.3, "web": 0.2})
    True
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # floats may sum to less than 1
    total = sum(exact.values())
    return {name: float(weight / total) for name, weight in exact.items()}


def blend_settings(config: Config) -> BlendSettings:
    return BlendSettings(weights=shares({entry.source: entry.weight for entry in config.sft.blend}))


def phase_settings(config: Config, name: str) -> PhaseSettings:
    (phase,) = (phase for phase in config.pretrain.phases if phase.name == name)
    return PhaseSettings(
        weights=shares({entry.corpus: entry.weight for entry in phase.blend}),
        phase=name,
        train_tokens=config.training(f"pretrain/{name}").tokens,
    )
