"""Build a model; and, only for a training, what changes its weights.

`build_model` gives a model that can be evaluated, merged, asked and saved. `with_optimizer` adds the
data-parallel wrapper, the optimizer and its schedule: 16 bytes under fp32 for each trained parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.config import Adapters, Optimizer
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.model import backend, lora, spec
from snaketron.model.initial import initialize_weights
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings
from snaketron.train import checkpoint
from snaketron.train.schedule import build_schedule

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """This rank's part of a model, with its adapters if it has some.

    `model` has the weights and their names. `module` is what computes: the same under fp32, and under bf16
    `model` in a wrapper that gives losses and logits as float32.
    """

    settings: TrainSettings
    run: RunSettings
    vocab_size: int  # tokens of the tokenizer, before padding
    config: TransformerConfig
    model: HybridModel
    module: torch.nn.Module

    @property
    def adapters(self) -> Adapters | None:
        return self.settings.lora if isinstance(self.settings, LoraSettings) else None

    @property
    def trained(self) -> HybridModel | lora.Part:
        """What checkpoints of a training of this model hold: all of it, or the adapters alone."""
        return lora.Part(self.model, adapters=True) if self.adapters else self.model

    @property
    def base(self) -> HybridModel | lora.Part:
        """What a base checkpoint holds: all but the adapters."""
        return lora.Part(self.model, adapters=False) if self.adapters else self.model

    def load_base(self, base: Path, optimizer: MegatronOptimizer | None = None) -> None:
        """Take the weights of a finished checkpoint, and its optimizer's state into `optimizer` if given."""
        version = Version(base)
        iteration = version.latest_iteration()
        if iteration is None:
            raise UserError(f"{base}: no {version.latest.name} there; it is not a checkpoint")
        checkpoint.load(base, iteration, self.base, optimizer)

    def load_trained(
        self, directory: Path, optimizer: MegatronOptimizer | None = None
    ) -> dict[str, Any] | None:
        """Take what a training of this model saved last; its progress, or None where nothing is saved."""
        iteration = Version(directory).latest_iteration()
        if iteration is None:
            return None
        return checkpoint.load(directory, iteration, self.trained, optimizer)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute without gradients and without dropout."""
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train(training)


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model with what changes its weights."""

    built: BuiltModel
    parallel_model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def build_model(settings: TrainSettings, run: RunSettings, vocab_size: int) -> BuiltModel:
    """A model with weights drawn from the seed, and adapters where the settings have some.

    `distributed` must have been entered. Raises `UserError` where this machine cannot compute it.
    """
    backend.check(settings.model, run)
    config = spec.transformer_config(
        settings.model,
        run.parallel,
        **spec.recomputation(run.recompute),
        **backend.cuda_graph_options(run),
        **(backend.packed_options() if settings.packed else {}),
    )
    model = spec.build_model(config, settings.model, vocab_size, settings.seq_length)
    initialize_weights(model, config, settings.seed)
    if isinstance(settings, LoraSettings):
        lora.add_adapters(model, settings.lora, settings.seed)
        # megatron-core makes routers on the CPU, from where only what is trained is moved.
        model.to(backend.device())
    module = Float16Module(config, model) if config.bf16 else model
    return BuiltModel(
        settings=settings, run=run, vocab_size=vocab_size, config=config, model=model, module=module
    )


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
