"""From the configuration to what one training needs: what defines its result, and how it is run.

The first part is a `params` of the rule, so a change trains again; the second is not.
"""

from __future__ import annotations

from typing import Literal

from snaketron.config import Config, Model, Optimizer, Pretrain, Run, Section, Sft


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


class RunSettings(Run):
    """How a training is run; none of it changes the result."""

    tracking: Literal["off", "offline", "online"]
    num_samples: int = 0
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


def sft_settings(config: Config) -> TrainSettings:
    """What defines the result of SFT."""
    sft = config.sft
    return TrainSettings(
        stage="sft",
        seed=config.seed,
        model=config.model,
        optimizer=sft.optimizer,
        seq_length=config.sft_data.pack_size,
        global_batch_size=sft.global_batch_size,
        train_iters=sft.train_iters,
        schedule=Schedule(
            style="cosine", start=0, warmup=sft.warmup_iters, end=sft.train_iters, decay=0, increment=1
        ),
    )


def run_settings(config: Config, section: Literal["pretrain", "sft"]) -> RunSettings:
    """How a stage is run."""
    run: Pretrain | Sft = getattr(config, section)
    values = {name: getattr(run, name) for name in Run.model_fields}
    if isinstance(run, Sft):
        values |= {"num_samples": run.num_samples, "sample_tokens": run.sample_tokens}
    return RunSettings(**values, tracking=config.tracking)
