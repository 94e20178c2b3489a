"""The learning rate, by megatron-core's scheduler."""

from __future__ import annotations

import snaketron.model  # noqa: F401 - before megatron-core
from snaketron.config import Optimizer
from snaketron.settings.schedule import Schedule

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_schedule(
    optimizer: MegatronOptimizer, values: Optimizer, schedule: Schedule
) -> OptimizerParamScheduler:
    """A scheduler at the start of the stage; `seek` moves it.

    Its unit is that of `Schedule`. WSD falls as min + (max - min) (1 - sqrt(d)), where d is the share of
    the decay that has passed (megatron-core's `minus_sqrt`).
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=values.learning_rate,
        min_lr=values.min_learning_rate,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.end,
        lr_decay_style=schedule.style,
        start_wd=values.weight_decay,
        end_wd=values.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.decay,
        lr_wsd_decay_style="minus_sqrt",
    )


def seek(scheduler: OptimizerParamScheduler, schedule: Schedule, iteration: int) -> None:
    """Set the learning rate of the step that follows `iteration` steps of the stage."""
    scheduler.num_steps = schedule.start + iteration * schedule.increment
    scheduler.step(0)
