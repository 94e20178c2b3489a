"""Build a model that can be evaluated, merged, asked and saved; a training adds what changes its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.config import Adapters
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.model import backend, checkpoint, lora, spec
from snaketron.model.initial import initialize_weights
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """This rank's part of a model, with its adapters if it has some.

    `model` has the weights and their names. `module` is what computes: the same under fp32, and under bf16
    `model` in a wrapper that gives losses and logits as float32. `alive` is called now and then by what takes
    long with the model, for a heartbeat.
    """

    settings: TrainSettings
    run: RunSettings
    vocab_size: int  # tokens of the tokenizer, before padding
    config: TransformerConfig
    model: HybridModel
    module: torch.nn.Module
    alive: Callable[[], None] = lambda: None

    @property
    def adapters(self) -> Adapters | None:
        """Settings of the adapters; None for a model without."""
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


def build_model(
    settings: TrainSettings, run: RunSettings, vocab_size: int, *, draw: bool = True
) -> BuiltModel:
    """A model with weights drawn from the seed, and adapters where the settings have some.

    Without `draw` the weights are whatever the memory holds, for a checkpoint that is loaded next.
    `distributed` must have been entered. Raises `UserError` where this machine cannot compute it.
    """
    backend.check(settings.model, run)
    config = spec.transformer_config(
        settings.model,
        run.parallel,
        **spec.recomputation(run.recompute),
        **spec.dispatching(settings.model, run, run.cluster),
        **backend.cuda_graph_options(run),
        **(backend.packed_options() if settings.packed else {}),
        perform_initialization=draw,
    )
    config.keeps_scan = not run.recompute  # no field of megatron-core's: `megatron.gpu` reads it
    model = spec.build_model(config, settings.model, run.parallel, vocab_size, settings.seq_length)
    if draw:
        initialize_weights(model, config, settings.seed)
    if isinstance(settings, LoraSettings):
        lora.add_adapters(model, settings.lora, settings.seed)
        # megatron-core makes routers on the CPU, from where only what is trained is moved.
        model.to(backend.device())
    module = Float16Module(config, model) if config.bf16 else model
    return BuiltModel(
        settings=settings, run=run, vocab_size=vocab_size, config=config, model=model, module=module
    )
