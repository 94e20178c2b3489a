"""What one training is told: what defines its result, and how it is run."""

from __future__ import annotations

from typing import Literal

from snaketron.config import Adapters, Cluster, Config, Model, Optimizer, Pretrain, Run, Section, Tuning

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
