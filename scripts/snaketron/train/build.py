"""What changes the weights of a model: the data-parallel wrapper, the optimizer and its schedule.

They take 16 bytes under fp32 for each trained parameter, so `model.build` makes models without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snaketron.config import Optimizer
from snaketron.model import backend
from snaketron.model.build import BuiltModel, build_model
from snaketron.settings.training import RunSettings, TrainSettings
from snaketron.train.schedule import build_schedule

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model with what changes its weights."""

    built: BuiltModel
    parallel_model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def with_optimizer(built: BuiltModel) -> Trainable:
    """Add gradient buffers, the optimizer and its schedule to a model; from then on it can be trained."""
    settings, config = built.settings, built.config
    parallel_model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=settings.optimizer.gradient_precision == "fp32",
            # The check makes the host wait in the middle of a step; the loop looks at the norm instead.
            check_for_nan_in_grad=settings.optimizer.clip_grad == 0,
            **backend.data_parallel_options(built.run),
        ),
        built.module,
    )
    if parallel_model.ddp_config.overlap_grad_reduce:
        config.no_sync_func = parallel_model.no_sync  # before the last micro-batch
    parallel_model.broadcast_params()
    optimizer = _build_optimizer(built, parallel_model)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    schedule = build_schedule(optimizer, settings.optimizer, settings.schedule)
    return Trainable(built=built, parallel_model=parallel_model, optimizer=optimizer, schedule=schedule)


def build_training(settings: TrainSettings, run: RunSettings, vocab_size: int) -> Trainable:
    """A new model with its optimizer. Raises `UserError` where this machine cannot train it."""
    backend.check(settings.model, run, settings.optimizer)
    return with_optimizer(build_model(settings, run, vocab_size))


def _build_optimizer(built: BuiltModel, parallel_model: DistributedDataParallel) -> MegatronOptimizer:
    values = built.settings.optimizer
    fused = backend.fuses_step(built.settings.model, values, built.run)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=values.learning_rate,
            min_lr=values.min_learning_rate,
            weight_decay=values.weight_decay,
            adam_beta1=values.adam_beta1,
            adam_beta2=values.adam_beta2,
            adam_eps=values.adam_eps,
            clip_grad=0.0 if fused else values.clip_grad,
            bf16=built.config.bf16,
            params_dtype=built.config.params_dtype,
            use_distributed_optimizer=True,
            **optimizer_options(values, built.run),
        ),
        [parallel_model],
    )
    if fused:
        backend.fuse_step(parallel_model, optimizer, values.clip_grad)
    return optimizer


def optimizer_options(optimizer: Optimizer, run: RunSettings) -> dict[str, Any]:
    """OptimizerConfig fields that say where the state lies and how precisely."""
    options: dict[str, Any] = {}
    if optimizer.moment_precision == "bf16":
        # Transformer Engine's FusedAdam keeps fp32 main weights as bf16 weights and the 16 bits after them.
        options |= {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
        }
    if run.offload_optimizer:
        options |= {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": run.offload_optimizer,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return options
