"""The training loop: pretraining phases and SFT alike, on megatron-core's parts."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snaketron.config import Optimizer
from snaketron.jobs import version as versions
from snaketron.jobs.heartbeat import Heartbeat
from snaketron.log import UserError, logger
from snaketron.model import backend, lora
from snaketron.model.initial import initialize_weights
from snaketron.model.spec import build_model, recomputation, transformer_config
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings
from snaketron.sizes.flops import training_flops
from snaketron.train import checkpoint
from snaketron.train.batches import SUMS, Batch, Batches, Report, Split
from snaketron.train.metrics import Clock, Metrics, Progress
from snaketron.train.schedule import build_schedule, seek

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A signal asked the training to stop; its state is saved."""

    def __init__(self, iteration: int, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {iteration}")


@contextlib.contextmanager
def distributed(settings: TrainSettings, run: RunSettings) -> Iterator[None]:
    """Join the other processes of this training and set up megatron-core's groups and random numbers."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != run.parallel.world_size:
        raise UserError(
            f"{world} processes were started, and the parallel sizes of the configuration want "
            f"{run.parallel.world_size}"
        )
    if run.cluster.gpus_per_node and not backend.HAS_GPU:
        raise UserError(
            f"cluster.gpus_per_node is {run.cluster.gpus_per_node} and torch sees no GPU on "
            f"{platform.node()}: look at nvidia-smi there, and whether this torch has CUDA; 0 trains on CPUs"
        )
    torch.set_num_threads(run.cpus_per_task)
    backend.device()  # makes this process' GPU the current one
    if world > 1:
        torch.distributed.init_process_group(backend.process_group_backend())
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            backend.process_group_backend(), store=store, rank=0, world_size=1
        )
    parallel_state.initialize_model_parallel(
        run.parallel.tensor_model_parallel_size,
        run.parallel.pipeline_model_parallel_size,
        context_parallel_size=run.parallel.context_parallel_size,
        expert_model_parallel_size=run.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=run.parallel.expert_tensor_parallel_size,
    )
    torch.manual_seed(settings.seed)
    # Transformer Engine's tracker of random numbers is the one that can be recorded.
    tensor_parallel.model_parallel_cuda_manual_seed(settings.seed, te_rng_tracker=run.cuda_graphs)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


class Trainer:
    """A model with its optimizer, and the steps that it has done.

    Every rank makes one and calls the same methods. `iteration` counts the steps of this stage.
    """

    def __init__(self, settings: TrainSettings, run: RunSettings, vocab_size: int) -> None:
        self.settings, self.run, self.vocab_size = settings, run, vocab_size
        self.iteration, self.seconds = 0, 0.0
        self.adapters = settings.lora if isinstance(settings, LoraSettings) else None
        flops = training_flops(settings.model, vocab_size, settings.seq_length)
        if self.adapters:
            flops *= 2 / 3  # frozen weights have no gradient
        self.clock = Clock(flops, run.parallel.world_size)
        in_background = backend.HAS_GPU if run.save_in_background is None else run.save_in_background
        self.saver = checkpoint.Saver(keep=run.keep_checkpoints, background=in_background)
        backend.check(settings.model, settings.optimizer, run)
        self.config = transformer_config(
            settings.model,
            run.parallel,
            **recomputation(run.recompute),
            **backend.cuda_graph_options(run),
            **(backend.packed_options() if settings.packed else {}),
        )
        self.model = build_model(self.config, settings.model, vocab_size, settings.seq_length)
        initialize_weights(self.model, self.config, settings.seed)
        # What checkpoints of this training hold.
        self.trained: HybridModel | lora.Part = self.model
        if self.adapters:
            lora.add_adapters(self.model, self.adapters, settings.seed)
            # megatron-core makes routers on the CPU, from where only what is trained is moved.
            self.model.to(backend.device())
            self.trained = lora.Part(self.model, adapters=True)
        wrapped = Float16Module(self.config, self.model) if self.config.bf16 else self.model
        self.parallel_model = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=settings.optimizer.gradient_precision == "fp32",
                # It makes the host wait in the middle of a step; `_step` looks at the norm instead.
                check_for_nan_in_grad=settings.optimizer.clip_grad == 0,
                **backend.data_parallel_options(run),
            ),
            wrapped,
        )
        if self.parallel_model.ddp_config.overlap_grad_reduce:
            self.config.no_sync_func = self.parallel_model.no_sync  # before the last micro-batch
        self.parallel_model.broadcast_params()
        values = settings.optimizer
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=values.learning_rate,
                min_lr=values.min_learning_rate,
                weight_decay=values.weight_decay,
                adam_beta1=values.adam_beta1,
                adam_beta2=values.adam_beta2,
                adam_eps=values.adam_eps,
                clip_grad=values.clip_grad,
                bf16=self.config.bf16,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=True,
                **optimizer_options(values, run),
            ),
            [self.parallel_model],
        )
        self.schedule = build_schedule(self.optimizer, values, settings.schedule)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        # Since the last line of metrics: `SUMS` by source, and summed up over steps how many there were, the
        # router loss and the loss of each MTP depth.
        self.sums = torch.zeros(1, len(SUMS), dtype=torch.float64)
        self.means = torch.zeros(2 + settings.model.mtp_num_layers, dtype=torch.float64)
        self.sources: tuple[str, ...] = ()
        self.stop_signal = 0

    # ------------------------------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        progress = {
            "iteration": self.iteration,
            "consumed_train_samples": self.iteration * self.settings.global_batch_size,
            "sums": self.sums.tolist(),
            "means": self.means.tolist(),
        }
        self.saver.save(directory, self.iteration, self.trained, self.optimizer, progress)

    def resume(self, directory: Path) -> bool:
        """Continue from the newest checkpoint of this version; False when there is none."""
        iteration = versions.latest_iteration(directory)
        if iteration is None:
            return False
        progress = checkpoint.load(directory, iteration, self.trained, self.optimizer)
        self.iteration = progress["iteration"]
        self.sums = torch.tensor(progress["sums"], dtype=torch.float64)
        self.means = torch.tensor(progress["means"], dtype=torch.float64)
        return True

    def start_from(self, base: Path, *, with_optimizer: bool) -> None:
        """Take the weights, and the optimizer's state if the curriculum goes on, of a finished checkpoint."""
        iteration = versions.latest_iteration(base)
        if iteration is None:
            raise UserError(f"{base}: no {versions.LATEST} there; it is not a checkpoint")
        model = lora.Part(self.model, adapters=False) if self.adapters else self.model
        checkpoint.load(base, iteration, model, self.optimizer if with_optimizer else None)
        if not with_optimizer:
            self.optimizer.reload_model_params()  # the optimizer's own copy of the weights

    # ----------------------------------------------------------------------------------------- steps

    def train(
        self,
        batches: Batches,
        directory: Path,
        sample: Callable[[], None] = lambda: None,
        observe: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Train to the end of the stage, with metrics, validation and checkpoints on the way.

        `sample` runs on every rank before the first step, after every `sample_interval` steps and after the
        last; `observe` gets each line of metrics on the rank that writes them. Raises `Stopped` on a signal.
        """
        self.sources = batches.sources
        metrics = Metrics(directory / "metrics.jsonl", self.iteration, observe, writer=is_writer())
        self.seconds = metrics.seconds
        tokens = self.settings.global_batch_size * self.settings.seq_length
        progress = Progress(self.settings.stage, self.settings.train_iters, tokens)
        heartbeat = Heartbeat(directory, self.settings.train_iters, writer=is_writer())
        heartbeat.beat(self.iteration)
        with self._signals(), long_lived():
            if self.iteration == 0:
                sample()
                self._validate(batches, metrics)
            while self.iteration < self.settings.train_iters:
                before = self.clock.spent["step"]
                with self.clock.spend("step"):
                    grad_norm = self._step(batches)
                self.seconds += self.clock.spent["step"] - before
                if is_writer():
                    progress.show(self.iteration, self._mean_loss())
                    heartbeat.beat(self.iteration, loss=self._mean_loss(), tokens_per_second=progress.speed)
                self._after_step(batches, metrics, directory, grad_norm, sample)
                heartbeat.beat(self.iteration)  # a validation or a checkpoint may have taken its time
            if batches.has("test"):
                metrics.write(iteration=self.iteration, **self.evaluate(batches, "test"))

    def _after_step(
        self,
        batches: Batches,
        metrics: Metrics,
        directory: Path,
        grad_norm: float,
        sample: Callable[[], None],
    ) -> None:
        versions.check_owner(directory)
        at_end = self.iteration == self.settings.train_iters
        if self.iteration % self.run.log_interval == 0 or at_end:
            metrics.write(**self._line(grad_norm))
            self.sums.zero_()
            self.means.zero_()
        if self.iteration % self.run.eval_interval == 0 or at_end:
            self._validate(batches, metrics)
        interval = self.run.sample_interval
        if at_end or (interval and self.iteration % interval == 0):
            sample()
        if self.iteration % self.run.save_interval == 0 or at_end or self.stop_signal:
            with self.clock.spend("checkpoint"):
                self.save(directory)
                if at_end or self.stop_signal:
                    self.saver.finish()
        else:
            self.saver.finish(wait=False)
        if self.stop_signal and not at_end:
            raise Stopped(self.iteration, self.stop_signal)

    def _step(self, batches: Batches) -> float:
        """One step over the global batch; returns the norm of the gradient before clipping."""
        if self.adapters and self.adapters.dropout:
            lora.seed_dropout(self.settings.seed, self.iteration)
        seek(self.schedule, self.settings.schedule, self.iteration)
        self.parallel_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs, micro_batches = self._forward_backward(
            batches,
            "train",
            self.iteration * self.settings.global_batch_size,
            self.settings.global_batch_size,
        )
        success, norm, _ = self.optimizer.step()
        grad_norm = math.nan if norm is None else float(norm)
        if not (success and math.isfinite(grad_norm)):
            raise RuntimeError(
                f"{self.settings.stage}: the gradient of step {self.iteration + 1} is not finite"
            )
        self.iteration += 1
        self._add_up(outputs, micro_batches)
        return grad_norm

    def _forward_backward(
        self, batches: Batches, split: Split, first: int, count: int, *, forward_only: bool = False
    ) -> tuple[list[torch.Tensor], int]:
        """Outputs of the loss function (last pipeline stage only) and the number of micro-batches."""
        data_parallel = parallel_state.get_data_parallel_world_size()
        micro_batches = count // (batches.micro_batch_size * data_parallel)
        data = batches.micro_batches(split, first, count)
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if forward_only else self.clock.waiting(data),
            model=[self.parallel_model],
            num_microbatches=micro_batches,
            seq_length=self.settings.seq_length,
            micro_batch_size=batches.micro_batch_size,
            forward_only=forward_only,
        )
        return outputs, micro_batches

    def evaluate(self, batches: Batches, split: Split) -> dict[str, Any]:
        """Mean loss of a token, in nats, over the same samples each time; equal on all ranks.

        The key is `<split>_loss`. Of conversations also `<split>_sample_loss`, the mean over conversations of
        each one's mean, and `<split>_sources`, the loss of a token of each source.
        """
        self.parallel_model.eval()
        with torch.no_grad(), backend.without_recordings():
            count = batches.round_up(self.run.eval_samples)
            outputs, _ = self._forward_backward(batches, split, 0, count, forward_only=True)
        self.parallel_model.train()
        sums, _ = self._sum_up(outputs, len(batches.sources))
        total = _means(sums.sum(0))
        found: dict[str, Any] = {f"{split}_loss": total["loss"]}
        if batches.sources:
            found[f"{split}_sample_loss"] = total["sample_loss"]
            found[f"{split}_sources"] = {
                name: _means(row)["loss"] for name, row in zip(batches.sources, sums, strict=True) if row[1]
            }
        return found

    def _validate(self, batches: Batches, metrics: Metrics) -> None:
        if batches.has("valid"):
            found = self.evaluate(batches, "valid")
            metrics.write(iteration=self.iteration, **found)
            if is_writer():
                by_source = ", ".join(f"{n} {loss:.4f}" for n, loss in found.get("valid_sources", {}).items())
                logger.info(
                    "%s: validation loss %.4f%s after step %d",
                    self.settings.stage,
                    found["valid_loss"],
                    f" ({by_source})" if by_source else "",
                    self.iteration,
                )

    # --------------------------------------------------------------------------------------- metrics

    def _sum_up(
        self, outputs: list[torch.Tensor], num_sources: int, mtp: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`SUMS` by source and `mtp`, summed over micro-batches and ranks, on all ranks, in float64."""
        shape = (max(1, num_sources), len(SUMS))
        sums = torch.stack(outputs).sum(0) if outputs else torch.zeros(shape, dtype=torch.float64)
        mtp = torch.zeros(0) if mtp is None else mtp
        total = torch.cat([x.flatten().double().to(backend.device()) for x in (sums, mtp)])
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        # The last rank is in the last pipeline stage, which has the losses.
        torch.distributed.broadcast(total, src=torch.distributed.get_world_size() - 1)
        total = total.cpu()
        return total[: sums.numel()].reshape(shape), total[sums.numel() :]

    def _add_up(self, outputs: list[torch.Tensor], micro_batches: int) -> None:
        depths = self.settings.model.mtp_num_layers
        mtp = MTPLossLoggingHelper.tracker.get("loss_values", torch.zeros(depths))
        sums, mtp = self._sum_up(outputs, len(self.sources), mtp)
        MTPLossLoggingHelper.clean_metrics_in_tracker()
        router = _router_loss(self.config, self.settings.model.hybrid_layer_pattern) / micro_batches
        # Signals reach ranks at other steps.
        signals = torch.tensor(self.stop_signal, device=backend.device())
        torch.distributed.all_reduce(signals, op=torch.distributed.ReduceOp.MAX)
        self.stop_signal = int(signals)
        self.sums = self.sums + sums
        tokens = sums.sum(0)[SUMS.index("tokens")]
        self.means += torch.tensor([1, router, *(mtp / tokens).tolist()], dtype=torch.float64)

    def _mean_loss(self) -> float:
        return _means(self.sums.sum(0))["loss"]

    def _line(self, grad_norm: float) -> dict[str, Any]:
        steps, router, *mtp = self.means.tolist()
        total = _means(self.sums.sum(0))
        step_tokens = self.settings.global_batch_size * self.settings.seq_length
        line = {
            "iteration": self.iteration,
            "consumed_train_tokens": self.iteration * step_tokens,
            "loss": total["loss"],
            **{f"mtp_{depth + 1}_loss": value / steps for depth, value in enumerate(mtp)},
            "load_balancing_loss": router / steps,
            "trained_tokens": total["trained_tokens"],
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "grad_norm": grad_norm,
            "timing": {
                "seconds": round(self.seconds, 3),
                "tokens_per_second": round(self.iteration * step_tokens / self.seconds, 1),
                **self.clock.report(int(steps) * step_tokens),
                **backend.memory(),
            },
        }
        if self.sources:
            line["sample_loss"] = total["sample_loss"]
            line["sources"] = {
                name: _means(row) for name, row in zip(self.sources, self.sums, strict=True) if row[-1]
            }
        return line

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note a signal instead of dying: the step is finished and saved. A second one ends the process."""

        def note(number: int, _frame: Any) -> None:
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def long_lived() -> Iterator[None]:
    """Have Python's garbage collector skip what is there: the model, at which it looks several times for a
    checkpoint, a third of the time that a training stands still for it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """What megatron-core's schedules call for each micro-batch.

    They divide gradients by the tokens of the step, padding left out, of the load balancing loss too; the
    weights of the other losses are made for that.
    """
    batch = next(batches)
    report: Report = batch.pop("report")
    weights = batch["loss_mask"][0]

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weighted sum, the tokens, and what is reported."""
        losses = losses.float()
        # Not torch.tensor: that copies from the host, which waits for the GPU.
        tokens = torch.full((), report.tokens, dtype=torch.int, device=losses.device)
        return (losses * weights).sum(), tokens, report.sums(losses)

    return model(attention_mask=None, **batch), loss_function


def _means(sums: torch.Tensor) -> dict[str, Any]:
    """Of a row of `SUMS`: losses as means, numbers as they are."""
    values = dict(zip(SUMS, sums.tolist(), strict=True))
    loss, sample_loss = values.pop("loss"), values.pop("sample_loss")
    return {
        "loss": loss / max(values["trained_tokens"], 1),
        "sample_loss": sample_loss / max(values["conversations"], 1),
        **{name: round(value) for name, value in values.items()},
    }


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


def is_writer() -> bool:
    """Whether this rank writes metrics and speaks: the last one, which has the losses."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _router_loss(config: Any, pattern: str) -> float:
    """Load balancing loss of the step, the mean over the routed layers; clears the tracker."""
    name = "seq_load_balancing_loss"
    losses: dict[str, Any] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1.0,
        iteration=0,
        # A pipeline stage without routed layers must take part in the reduction.
        force_initialize=True,
        track_names=name,
        num_layers=config.num_layers,
        moe_layer_freq=[int(layer == "E") for layer in pattern],
        mtp_num_layers=config.mtp_num_layers,
        total_loss_dict=losses,
    )
    return float(losses[name])
