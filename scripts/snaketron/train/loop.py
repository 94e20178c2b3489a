"""The training loop: pretraining phases and SFT alike, on megatron-core's parts."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snaketron.jobs.heartbeat import Heartbeat
from snaketron.jobs.launch import is_writer
from snaketron.jobs.owner import check_owner
from snaketron.jobs.version import Version
from snaketron.log import logger
from snaketron.model import backend, lora
from snaketron.model.checkpoint import Saver
from snaketron.model.megatron import internals
from snaketron.settings.schedule import steady_steps
from snaketron.sizes.flops import training_flops
from snaketron.sizes.layout import layout
from snaketron.tracking.warnings import Warning, Watch, warnings_of
from snaketron.train.batches import Batches
from snaketron.train.build import Trainable
from snaketron.train.evaluate import evaluate
from snaketron.train.losses import Batch, Sums, Totals, compute, sum_over_ranks
from snaketron.train.metrics import Clock, Metrics, Progress
from snaketron.train.observed import Observed
from snaketron.train.schedule import seek
from snaketron.train.stopping import Stopped, Stopping, any_rank
from snaketron.wording import after

SILENCE_S = 5.0  # nothing takes longer without a line that says what it is


class Trainer:
    """A training, and the steps that it has done.

    Every rank makes one and calls the same methods. `iteration` counts the steps of this stage.
    """

    def __init__(self, training: Trainable) -> None:
        self.built, self.optimizer, self.schedule = training.built, training.optimizer, training.schedule
        self.model, self.parallel_model = self.built.model, training.parallel_model
        self.settings, self.run = self.built.settings, self.built.run
        self.iteration, self.seconds = 0, 0.0
        recorded = backend.records_micro_batches(self.settings, self.run)
        self.micro_batches = backend.schedule(recorded=recorded)
        self.clock = Clock(self.run.parallel.world_size)
        steady = steady_steps(self.settings.schedule, self.settings.optimizer, self.settings.train_iters)
        self.saver = Saver.configured(self.run, steady)
        self.observed = Observed(self.built.config, self.model)
        model = self.settings.model
        possible = model.num_moe_experts / model.moe_router_topk if model.routed_layers else 1.0
        self.watch = Watch(possible, layout(self.run, self.run.cluster).tasks_per_node)
        self.ahead: tuple[Batches, int, Batch, Iterator[Batch]] | None = None
        self.cleared = False  # whether the gradients are those of no step
        self.totals = Totals()  # since the last line of metrics
        self.sources: tuple[str, ...] = ()
        self.mixed = False  # whether sequences of several sources share a micro-batch
        self.stopping = Stopping()
        self.quick: set[str] = set()  # what took less than `SILENCE_S` the last time

    # ------------------------------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        """Write a checkpoint of this step into the version `directory`, or begin to, as `Saver.save` does."""
        progress = {
            "iteration": self.iteration,
            "consumed_train_samples": self.iteration * self.settings.global_batch_size,
            **self.totals.saved(),
        }
        self.built.alive()
        with self._announced("saving", always=self.iteration == self.settings.train_iters):
            self.saver.save(directory, self.iteration, self.built.trained, self.optimizer, progress)

    def resume(self, directory: Path) -> bool:
        """Continue from the newest checkpoint of this version; False when there is none."""
        progress = self.built.load_trained(directory, self.optimizer)
        if progress is None:
            return False
        self.iteration, self.totals = progress["iteration"], Totals.of_saved(progress)
        return True

    def start_from(self, base: Path, *, optimizer_of_base: bool) -> None:
        """Take the weights, and the optimizer's state if the curriculum goes on, of a finished checkpoint."""
        self.built.load_base(base, self.optimizer if optimizer_of_base else None)
        if not optimizer_of_base:
            self.optimizer.reload_model_params()  # the optimizer's own copy of the weights

    # ----------------------------------------------------------------------------------------- steps

    def train(
        self,
        batches: Batches,
        directory: Path,
        answer: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the end of the stage, with metrics, validation and checkpoints on the way.

        `answer` runs on every rank before the first step, after every `sample_interval` steps and after the
        last. Raises `Stopped` on a signal.
        """
        self.sources, self.mixed = batches.sources, batches.mixed
        version = Version(directory)
        metrics = Metrics(version.metrics, self.iteration, self.watch.remember, writer=is_writer())
        self.seconds = metrics.seconds
        tokens = self.settings.global_batch_size * self.settings.seq_length
        progress = Progress(self.settings.stage, self.settings.train_iters, tokens)
        heartbeat = Heartbeat(version.heartbeat, self.settings.train_iters, writer=is_writer())
        heartbeat.beat(self.iteration)
        self.built = dataclasses.replace(self.built, alive=heartbeat.alive)
        self.saver.prepare(self.optimizer)
        freeze()
        with self.stopping.noted():
            if self.iteration == 0:
                answer()
                self._validate(batches, metrics)
            elif any_rank(self._lacks_validation(batches, metrics)):
                self._measure(batches, metrics, answer)
            if self.stopping.agreed:  # what there is to keep is saved
                raise Stopped(self.iteration, self.stopping.agreed)
            if self.iteration < self.settings.train_iters and is_writer():
                first, last = self.iteration + 1, self.settings.train_iters
                logger.info("%s: training, steps %d to %d", self.settings.stage, first, last)
            while self.iteration < self.settings.train_iters:
                before = self.clock.spent["step"]
                with self.clock.spend("step"):
                    grad_norm = self._step(batches)
                self.seconds += self.clock.spent["step"] - before
                if is_writer():
                    loss = self._mean_loss()
                    progress.show(self.iteration, loss)
                    heartbeat.beat(self.iteration, loss=loss, tokens_per_second=progress.speed)
                self._after_step(batches, metrics, directory, grad_norm, answer)
                heartbeat.beat(self.iteration)  # a validation or a checkpoint may have taken its time
            if batches.has("test"):
                with self._announced("testing"):
                    found = evaluate(self.built, batches, "test", give_up=self.stopping.is_told)
                if found is None:
                    raise Stopped(self.iteration, self.stopping.agreed)
                metrics.write(iteration=self.iteration, **found)

    def _after_step(
        self,
        batches: Batches,
        metrics: Metrics,
        directory: Path,
        grad_norm: float,
        answer: Callable[[], None],
    ) -> None:
        check_owner(Version(directory))
        at_end = self.iteration == self.settings.train_iters
        if self._is_logged(self.iteration):
            line = self.watch.judged(self._line(grad_norm))
            metrics.write(**line)
            self._say(warnings_of([line]))
        if self.iteration % self.run.log_interval == 0:  # a longer training goes on with what is not told yet
            self.totals.clear()
        measured = self._measure(batches, metrics, answer)
        if self.saver.is_due(self.iteration) or at_end or self.stopping.agreed:
            with self.clock.spend("checkpoint"):
                self.save(directory)
                if at_end or self.stopping.agreed:
                    self.saver.finish()
        else:
            self.saver.finish(wait=False)
        if self.stopping.agreed and not (at_end and measured):
            raise Stopped(self.iteration, self.stopping.agreed)

    def _measure(self, batches: Batches, metrics: Metrics, answer: Callable[[], None]) -> bool:
        """Validate and answer where that is due after this step.

        False where a signal asks to stop before the loss is known: it may take longer than there is time left
        to save. Who continues with this step does both.
        """
        if self._is_due(self.run.eval_interval) and not self._validate(batches, metrics):
            return False
        if self._is_due(self.run.sample_interval):
            answer()
        return True

    def _is_due(self, interval: int | None) -> bool:
        """Whether what is done after so many steps, and after the last one, is to be done now."""
        at_end = self.iteration == self.settings.train_iters
        return at_end or (interval is not None and self.iteration % interval == 0)

    def _lacks_validation(self, batches: Batches, metrics: Metrics) -> bool:
        """Whether a training stopped after this step before its validation."""
        due = batches.has("valid") and self._is_due(self.run.eval_interval)
        return due and is_writer() and not metrics.has_validation

    def _step(self, batches: Batches) -> float:
        """One step over the global batch; returns the norm of the gradient before clipping."""
        adapters = self.built.adapters
        if adapters and adapters.dropout:
            lora.seed_dropout(self.settings.seed, self.iteration)
        seek(self.schedule, self.settings.schedule, self.iteration)
        if not self.cleared:
            self._clear_gradients()
        first = self.iteration * self.settings.global_batch_size
        self.observed.begin(is_due=self._is_logged(self.iteration + 1))
        outputs = self._forward_backward(batches, first)
        success, norm, _ = self.optimizer.step()
        # What the next step needs is started before the host waits for this one, so that a GPU has no pause.
        self._clear_gradients()
        if self.iteration + 1 < self.settings.train_iters:
            self._read_ahead(batches, first + self.settings.global_batch_size)
        grad_norm = math.nan if norm is None else float(norm)
        self.observed.end()
        if not (success and math.isfinite(grad_norm)):
            raise RuntimeError(
                f"{self.settings.stage}: the gradient of step {self.iteration + 1} is not finite; look "
                "at the gradient norm and the warnings before it, then at the learning rate and the precision"
            )
        self.iteration += 1
        tokens = self.settings.global_batch_size * self.settings.seq_length
        self.clock.worked(tokens, tokens * self._flops(batches.mean_length(first)))
        self._add_up(outputs, batches.num_micro_batches(self.settings.global_batch_size))
        return grad_norm

    def _flops(self, length: float | None) -> float:
        """Model FLOPs of a token, in sequences of this mean length; None: of the model's longest."""
        return training_flops(
            *(self.settings.model, self.built.vocab_size, length or self.settings.seq_length),
            frozen=self.built.adapters is not None,
        )

    def _clear_gradients(self) -> None:
        """Forget the gradients of the step before: to a GPU it is one more task in its queue."""
        self.parallel_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.cleared = True

    def _forward_backward(self, batches: Batches, first: int) -> list[Sums]:
        """Compute the global batch that begins with sample `first`; the sums of each micro-batch."""
        self.cleared = False
        count = self.settings.global_batch_size
        known, self.ahead = self.ahead, None
        if known and known[:2] == (batches, first):
            micro_batches: Iterator[Batch] = itertools.chain([known[2]], known[3])
        else:
            micro_batches = self._micro_batches(batches, first)
        return compute(
            self.parallel_model,
            micro_batches,
            count=batches.num_micro_batches(count),
            micro_batch_size=batches.micro_batch_size,
            seq_length=self.settings.seq_length,
            schedule=self.micro_batches,
        )

    def _micro_batches(self, batches: Batches, first: int) -> Iterator[Batch]:
        return self.clock.waiting(batches.micro_batches("train", first, self.settings.global_batch_size))

    def _read_ahead(self, batches: Batches, first: int) -> None:
        """Read the first micro-batch of the next step while a GPU computes this one.

        Those after it are read beside the computation of the ones before them.
        """
        micro_batches = self._micro_batches(batches, first)
        if (batch := next(micro_batches, None)) is not None:
            self.ahead = (batches, first, batch, micro_batches)

    def _validate(self, batches: Batches, metrics: Metrics) -> bool:
        """Write the loss on held-out samples; False where a signal asks to stop before it is known."""
        if not batches.has("valid"):
            return True
        with self._announced("validating"):
            found = evaluate(self.built, batches, "valid", give_up=self.stopping.is_told)
        if found is None:
            if is_writer():
                logger.info(
                    "%s: asked to stop, so the validation is left to the next start", self.settings.stage
                )
            return False
        metrics.write(iteration=self.iteration, **found)
        if is_writer():
            by_source = ", ".join(f"{n} {loss:.4f}" for n, loss in found.get("valid_sources", {}).items())
            logger.info(
                "%s: validation loss %.4f%s %s",
                self.settings.stage,
                found["valid_loss"],
                f" ({by_source})" if by_source else "",
                after(self.iteration),
            )
        return True

    # --------------------------------------------------------------------------------------- metrics

    def _add_up(self, outputs: list[Sums], micro_batches: int) -> None:
        """Add a step to the totals, and learn of signals that reached other ranks."""
        model = self.settings.model
        mtp = internals.take_mtp_losses(model.mtp_num_layers)
        sums, mtp = sum_over_ranks(outputs, len(self.sources), mtp, mixed=self.mixed)
        router = internals.take_router_loss(self.built.config, model.routed_layers) / micro_batches
        self.stopping.agree()
        self.totals.add(sums, router, (mtp / sums.total("tokens")).tolist())

    def _mean_loss(self) -> float:
        return self.totals.sums.means()["loss"]

    def _line(self, grad_norm: float) -> dict[str, Any]:
        """The metrics since the last line."""
        totals, sums = self.totals, self.totals.sums
        mean = sums.means()
        step_tokens = self.settings.global_batch_size * self.settings.seq_length
        times = self.clock.report()
        line = {
            "iteration": self.iteration,
            "consumed_train_tokens": self.iteration * step_tokens,
            "loss": mean["loss"],
            **{f"mtp_{depth}_loss": loss / totals.steps for depth, loss in enumerate(totals.mtp, start=1)},
            "load_balancing_loss": totals.load_balancing / totals.steps,
            "trained_tokens": mean["trained_tokens"],
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "grad_norm": grad_norm,
            "timing": {
                "seconds": round(self.seconds, 3),
                "tokens_per_second": round(self.iteration * step_tokens / self.seconds, 1),
                **times,
                **self.observed.slowest(times["data_seconds"]),
                **backend.memory(),
            },
            **self.observed.experts(),
        }
        if self.sources:
            if not self.mixed:
                line["sample_loss"] = mean["sample_loss"]
            line["sources"] = {
                name: sums.means_of(source)
                for source, name in enumerate(self.sources)
                if sums["packs"][source]
            }
        return line

    def _is_logged(self, iteration: int) -> bool:
        """Whether a line of metrics is written after a step."""
        return iteration % self.run.log_interval == 0 or iteration == self.settings.train_iters

    def _say(self, warnings: list[Warning]) -> None:
        for warning in warnings if is_writer() else ():
            logger.warning("%s: step %d: %s", self.settings.stage, warning.iteration, warning.text)

    @contextlib.contextmanager
    def _announced(self, what: str, *, always: bool = False) -> Iterator[None]:
        """Say what is done now, unless it took no time worth a line when it was done before."""
        if (always or what not in self.quick) and is_writer():
            logger.info("%s: %s %s", self.settings.stage, what, after(self.iteration))
        began = time.monotonic()
        yield
        if time.monotonic() - began < SILENCE_S:
            self.quick.add(what)
        else:
            self.quick.discard(what)


def freeze() -> None:
    """Have Python's garbage collector skip the objects that are there, the model too, from now on.

    It would look at them several times for a checkpoint, a third of the time that a training stands still.
    They stay so after the training: to thaw them is to thaw all that was imported, a million objects.
    """
    gc.collect()
    gc.freeze()
