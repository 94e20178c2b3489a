"""What the jobs on conversations are told."""

from __future__ import annotations

import math
from datetime import date
from typing import Any, ClassVar, Literal, Self

from snaketron.config import ChatSource, Config, Reasoning, Section
from snaketron.config.data import LongConversations, Packing, Split
from snaketron.settings import of_one_split, taken, unless
from snaketron.settings.text import ReadSettings

from pydantic import Field, model_validator


class RenderSettings(ReadSettings):
    """Everything that, with the raw files, the tokenizer and the template, defines a rendered shard."""

    section: ClassVar[str] = "sft_data"
    source: str
    messages_field: str
    tools_field: str
    metadata_fields: list[str] = Field(default_factory=list)
    max_tokens: int | None = None
    valid_fraction: float
    test_fraction: float
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    sequences: Literal["conversation", "turn"] = "conversation"
    reasoning: Reasoning = Field(default_factory=Reasoning)
    seed: int | None = None  # None unless reasoning modes are chosen by it
    # These are left out of the JSON as long as they are what they are here.
    system_field: str | None = unless("system")
    role_key: str = unless("role")
    content_key: str = unless("content")
    roles: dict[str, str] = unless({})
    thinking_tags: list[str] | None = unless(["<think>", "</think>"])
    template_date: date = unless(date(2026, 1, 1))
    split: Split | None = unless(None)  # of all conversations


def render_settings(config: Config, source: ChatSource) -> RenderSettings:
    """What defines the rendered conversations of a source."""
    data = config.sft_data
    reasoning = source.reasoning or data.reasoning
    chosen = reasoning.stripped or reasoning.low_effort or reasoning.truncated
    return taken(
        RenderSettings,
        source,
        data,
        source=source.name,
        template_arguments=data.template_arguments | source.template_arguments,
        reasoning=reasoning,
        seed=config.seed if chosen else None,
        **of_one_split(source),
    )


class PackSettings(Section):
    """Everything that, with the rendered conversations, defines the packs of a source."""

    pack_size: int
    algorithm: Packing
    padding_multiple: int = 1
    long_conversations: LongConversations = "drop"
    seed: int | None = unless(None)  # None unless the order is shuffled

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.pack_size % self.padding_multiple:
            raise ValueError(
                f"padding_multiple {self.padding_multiple} does not divide pack_size {self.pack_size}"
            )
        return self


def pack_settings(config: Config) -> PackSettings:
    """What defines the packs of every source."""
    data = config.sft_data
    seed = config.seed if data.algorithm == "first_fit_shuffle" else None
    return taken(PackSettings, data, padding_multiple=padding_multiple(config), seed=seed)


def padding_multiple(config: Config) -> int:
    """The multiple that packs leave room to pad each conversation to: what the trainings on packs need."""
    if config.sft_data.padding_multiple:
        return config.sft_data.padding_multiple
    return math.lcm(*(t.run.parallel.sequence_multiple for t in config.trainings() if t.packed))
