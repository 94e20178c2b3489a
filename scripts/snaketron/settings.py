"""From the configuration to what one training needs: what defines its result, and how it is run.

The first part is a `params` of the rule, so a change trains again; the second is not.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from snaketron.config import (
    Adapters,
    ChatSource,
    Cluster,
    Config,
    Corpus,
    Model,
    Optimizer,
    Pretrain,
    Reasoning,
    Run,
    Section,
    Tuning,
)

from pydantic import Field


class Schedule(Section):
    """The learning rate, in units of which a step has `increment`: tokens in pretraining, steps in SFT.

    It rises linearly over the first `warmup` units. WSD then stays and falls over the last `decay` units
    before `end` as 1 - sqrt; cosine falls from the warm-up to `end`.
    """

    style: Literal["WSD", "cosine"]
    start: int
    warmup: int
    end: int
    decay: int
    increment: int


class TrainSettings(Section):
    """Everything that, with the data and the base checkpoint, defines what a training produces."""

    stage: str
    seed: int
    model: Model
    optimizer: Optimizer
    seq_length: int
    global_batch_size: int
    train_iters: int
    schedule: Schedule
    packed: bool = False  # whether samples are packs, which have padding
    loss_average: Literal["token", "sample"] = "token"
    switch_loss_average_after: int | None = None


class LoraSettings(TrainSettings):
    """The same of a training of adapters, on a base that stays as it is."""

    lora: Adapters


class RunSettings(Run):
    """How a training is run; none of it changes the result."""

    cluster: Cluster = Field(default_factory=Cluster)
    tracking: Literal["off", "offline", "online"]
    cuda_graphs: bool = False  # of pretraining: packed sequences have no fixed shapes
    num_samples: int = 0
    sample_interval: int | None = None
    sample_tokens: int = 0


class ReadSettings(Section):
    """Which rows of raw files are read, and what becomes of bad ones; see `config.PretrainData`."""

    where: dict[str, list[str | int | bool]] = Field(default_factory=dict)
    max_documents: int | None = None
    bad_rows: Literal["fail", "drop"] = "fail"
    invalid_text: Literal["fail", "replace", "drop"] = "fail"
    max_line_bytes: int = 50_000_000
    max_dropped_fraction: float = 0.01


class TokenizeSettings(ReadSettings):
    """Everything that, with the raw files and the tokenizer, defines a tokenized shard."""

    corpus: str
    text_field: str
    metadata_fields: list[str] = Field(default_factory=list)
    max_tokens: int | None = None
    valid_fraction: float
    test_fraction: float
    document_order: Literal["kept", "shuffled"] = "kept"
    seed: int | None = None  # of a shuffled order
    max_document_tokens: int | None = None
    long_documents: Literal["cut", "drop"] = "cut"


class RenderSettings(ReadSettings):
    """Everything that, with the raw files, the tokenizer and the template, defines a rendered shard."""

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
    seed: int | None = None  # of the choice of reasoning modes


def read_settings(config: Config, corpus: Corpus) -> ReadSettings:
    """How the raw rows of a corpus are read."""
    data = config.pretrain_data
    return ReadSettings(
        where=corpus.where,
        max_documents=corpus.max_documents,
        bad_rows=data.bad_rows,
        invalid_text=data.invalid_text,
        max_line_bytes=data.max_line_bytes,
        max_dropped_fraction=data.max_dropped_fraction,
    )


def tokenize_settings(config: Config, corpus: Corpus) -> TokenizeSettings:
    """What defines the tokens of a corpus; of a curated one, `where` and the limit were applied before."""
    data = config.pretrain_data
    read = read_settings(config, corpus)
    if corpus.curation:
        read = read.model_copy(update={"where": {}, "max_documents": None})
    return TokenizeSettings(
        **read.model_dump(),
        corpus=corpus.name,
        text_field="text" if corpus.curation else corpus.text_field,
        metadata_fields=corpus.metadata_fields,
        max_tokens=corpus.max_tokens,
        valid_fraction=data.valid_fraction,
        test_fraction=data.test_fraction,
        document_order=data.document_order,
        seed=config.seed if data.document_order == "shuffled" else None,
        max_document_tokens=data.max_document_tokens,
        long_documents=data.long_documents,
    )


def render_settings(config: Config, source: ChatSource) -> RenderSettings:
    """What defines the rendered conversations of a source."""
    data = config.sft_data
    reasoning = source.reasoning or data.reasoning
    chosen = reasoning.stripped or reasoning.low_effort or reasoning.truncated
    return RenderSettings(
        where=source.where,
        max_documents=source.max_documents,
        bad_rows=data.bad_rows,
        invalid_text=data.invalid_text,
        max_line_bytes=data.max_line_bytes,
        max_dropped_fraction=data.max_dropped_fraction,
        max_tokens=source.max_tokens,
        source=source.name,
        messages_field=source.messages_field,
        tools_field=source.tools_field,
        metadata_fields=source.metadata_fields,
        valid_fraction=data.valid_fraction,
        test_fraction=data.test_fraction,
        template_arguments=data.template_arguments | source.template_arguments,
        sequences=source.sequences,
        reasoning=reasoning,
        seed=config.seed if chosen else None,
    )


def pretrain_settings(config: Config, name: str) -> TrainSettings:
    """What defines the result of a pretraining phase.

    A phase that ends before the decay begins does not depend on how long the curriculum is, so a longer
    curriculum does not train it again.
    """
    pretrain = config.pretrain
    index = [p.name for p in pretrain.phases].index(name)
    iters, batch, length = pretrain.steps(pretrain.phases[index])
    spans = pretrain.spans()
    (start, end), total = spans[index], spans[-1][1]
    decays = total - pretrain.decay_tokens < end
    return TrainSettings(
        stage=f"pretrain/{name}",
        seed=config.seed,
        model=config.model,
        optimizer=pretrain.optimizer,
        seq_length=length,
        global_batch_size=batch,
        train_iters=iters,
        schedule=Schedule(
            style="WSD",
            start=start,
            warmup=pretrain.warmup_tokens,
            end=total if decays else max(end, pretrain.warmup_tokens + 1),
            decay=pretrain.decay_tokens if decays else 0,
            increment=batch * length,
        ),
    )


def sft_settings(config: Config, section: Literal["sft", "lora"] = "sft") -> TrainSettings:
    """What defines the result of SFT, or what LoRA shares with it."""
    sft: Tuning = getattr(config, section)
    return TrainSettings(
        stage=section,
        seed=config.seed,
        model=config.model,
        optimizer=sft.optimizer,
        seq_length=config.sft_data.pack_size,
        global_batch_size=sft.global_batch_size,
        train_iters=sft.train_iters,
        schedule=Schedule(
            style="cosine", start=0, warmup=sft.warmup_iters, end=sft.train_iters, decay=0, increment=1
        ),
        packed=True,
        loss_average=sft.loss_average,
        switch_loss_average_after=sft.switch_loss_average_after,
    )


def lora_settings(config: Config, stage: Literal["lora", "lora_merged"] = "lora") -> LoraSettings:
    """What defines the result of LoRA, and of merging it."""
    adapters = Adapters(**{name: getattr(config.lora, name) for name in Adapters.model_fields})
    return LoraSettings(**sft_settings(config, "lora").model_dump() | {"stage": stage}, lora=adapters)


def padding_multiple(config: Config) -> int:
    """What packs leave room to pad each conversation to: what the trainings on them need."""
    if config.sft_data.padding_multiple:
        return config.sft_data.padding_multiple
    return math.lcm(*(run.parallel.sequence_multiple for run in (config.sft, config.lora)))


def run_settings(config: Config, section: Literal["pretrain", "sft", "lora"]) -> RunSettings:
    """How a stage is run."""
    run: Pretrain | Tuning = getattr(config, section)
    values = {name: getattr(run, name) for name in Run.model_fields}
    if isinstance(run, Tuning):
        values |= {
            "num_samples": run.num_samples,
            "sample_interval": run.sample_interval,
            "sample_tokens": run.sample_tokens,
        }
    else:
        values["cuda_graphs"] = run.cuda_graphs
    return RunSettings(**values, cluster=config.cluster, tracking=config.tracking)
