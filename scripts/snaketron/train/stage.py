"""A training stage as a program: from the command line to a published checkpoint."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.config import Model
from snaketron.data.tokenizer import Info, tokenizer_info
from snaketron.files import read_json, sha256
from snaketron.huggingface.config import copy_tokenizer
from snaketron.jobs import continuation, heartbeat, launch, supervisor
from snaketron.jobs.attempts import Attempts, read_attempts
from snaketron.jobs.lines import read_metrics
from snaketron.jobs.version import Description, Version, check_place, published, version_key
from snaketron.lineage.record import Entry, making, of_file
from snaketron.log import UserError, begin_log, log_to, logger
from snaketron.settings import read_settings
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings, model_differences
from snaketron.sizes.layout import layout
from snaketron.sizes.outlook import Inputs
from snaketron.tracking.follow import following
from snaketron.tracking.sinks import Run
from snaketron.train.metrics import mix, performance
from snaketron.wording import size_text

if TYPE_CHECKING:  # imports megatron-core (5 s), which a finished version does not need
    from snaketron.model.build import BuiltModel
    from snaketron.train.batches import Batches
    from snaketron.train.loop import Trainer


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all trainings have."""
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(adapters=None, index=None)  # a checkpoint and a directory that only some read
    parser.add_argument("--blend", type=Path, required=True, help="blend.json of the data")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer directory")
    parser.add_argument("--base", type=Path, nargs="?", help="checkpoint to start from; none: random weights")
    parser.add_argument("--settings", required=True, help="JSON of TrainSettings: what is trained")
    parser.add_argument("--run-settings", required=True, help="JSON of RunSettings: how it is run")
    parser.add_argument("--output", type=Path, required=True, help="link to make: <ckpt>/<stage>")
    parser.add_argument(
        "--log-file", type=Path, help="file for this attempt's log; the version keeps all of them"
    )
    parser.add_argument(
        "--attempt", type=int, default=1, help="how often Snakemake has run this; later ones do not try again"
    )
    return parser


def run_stage(
    args: argparse.Namespace,
    train: Callable[[Stage], int],
    kind: type[TrainSettings] = TrainSettings,
    *,
    has_steps: bool = True,
) -> int:
    """Supervise a stage and publish it, or `train` as one of its processes; the exit status.

    `kind` is what `--settings` holds. A stage that `has_steps` goes on from a shorter one that began like it.
    """
    if launch.is_rank():
        launch.join()
    stage = Stage.from_args(args, kind)
    stage.open_logs(args.log_file)
    if launch.is_rank():
        with launch.telling(stage.version.failures):
            return train(stage)
    check_place(stage.output)
    stage.version.ask(stage.output)
    status = supervisor.supervise(
        stage.settings.stage,
        stage.version,
        stage.run,
        attempt=args.attempt,
        prepare=stage.go_on if has_steps else lambda: None,
        beside=lambda: following(stage.followed(), launch.environment(stage.run), args.log_file),
    )
    if status == 0:
        stage.publish()
    return status


@dataclass(frozen=True)
class Stage:
    """One stage with its inputs identified, in the supervisor and in each of its processes alike."""

    settings: TrainSettings
    run: RunSettings
    blend: Path
    tokenizer_directory: Path
    tokenizer: Info
    base: Path | None  # checkpoint to start from
    inputs: list[Entry]  # each with its identity: `sha256`, or `version` of a checkpoint
    output: Path
    index: Path | None = None  # of the samples of pretraining
    started: float = field(default_factory=time.monotonic, compare=False)

    @classmethod
    def from_args(cls, args: argparse.Namespace, kind: type[TrainSettings] = TrainSettings) -> Stage:
        """Read the settings and identify the inputs; `UserError` where they do not fit together."""
        settings = read_settings(kind, args.settings)
        run = read_settings(RunSettings, args.run_settings, "--run-settings")
        tokenizer = tokenizer_info(args.tokenizer)
        inputs = [
            Entry("blend", str(args.blend), sha256=_hash(args.blend)),
            Entry("tokenizer", str(args.tokenizer / "tokenizer.json"), sha256=tokenizer.sha256),
        ]
        if args.base:
            inputs.append(Entry("base", str(args.base), version=Version(args.base).identity))
            check_base(args.base, settings.model, tokenizer.sha256)
        elif kind is LoraSettings:
            raise UserError("--base: name the checkpoint that the adapters are for")
        if args.adapters:
            inputs.append(Entry("adapters", str(args.adapters), version=Version(args.adapters).identity))
        return cls(
            settings, run, args.blend, args.tokenizer, tokenizer, args.base, inputs, args.output, args.index
        )

    @property
    def identities(self) -> list[str]:
        """Of the inputs, in their order."""
        return [entry.identity for entry in self.inputs]

    @cached_property
    def key(self) -> str:
        """The hash of what defines the result, by which the version is found again."""
        return version_key(self.settings.model_dump(), self.identities)

    @cached_property
    def version(self) -> Version:
        """Where this stage works."""
        return Version.of(self.output, self.settings.stage, self.key)

    def followed(self) -> Run:
        """What the process that follows this training is told."""
        attempts = Attempts(self.settings.stage, self.version.attempts, self.run.max_restarts)
        return Run(
            self.version.directory,
            self.settings.stage,
            self.inputs,
            {"settings": self.settings.model_dump(), "run": self.run.model_dump()},
            mode=self.run.tracking,
            upload=self.run.tracking_upload,
            tensorboard=self.run.tensorboard,
            notify=self.run.notify,
            attempts=len(attempts.all),
            steps=max((line["iteration"] for line in read_metrics(self.version.metrics)[0]), default=0),
        )

    def open_logs(self, log_file: Path | None) -> None:
        """Let the process that writes metrics log to the version and to `log_file`; others only warn."""
        if not launch.is_writer():
            logger.setLevel(logging.WARNING)
            return
        log_to(self.version.log)
        if log_file:
            if not launch.is_rank():
                begin_log(log_file)
            log_to(log_file)

    def go_on(self) -> None:
        """Take over the last checkpoint of a shorter training that began like this one, if there is one."""
        version, settings = self.version, self.settings.model_dump()
        inputs = Inputs(self.identities, read_json(self.blend) if self.index else None)
        if version.latest_iteration() is not None:
            return
        while origin := continuation.find(version, settings, inputs):
            if continuation.take_over(version, origin, self.run):
                logger.info("%s: continues at %s", self.settings.stage, origin)
                return
        version.origin.unlink(missing_ok=True)  # it named a checkpoint that a person deleted here
        if why := continuation.why_not(version, published(self.output), settings, inputs):
            logger.info("%s: starts over: %s", self.settings.stage, why)

    def train(
        self,
        make_batches: Callable[[Stage], Any],
        *,
        optimizer_of_base: bool,
        answer: Callable[[BuiltModel, int, Any], None] = lambda built, iteration, batches: None,
    ) -> int:
        """Train to the end, and return the exit status of this process.

        `optimizer_of_base` takes the optimizer's state from the base checkpoint as well. `answer` gets the
        model and its iteration before the first step, on the way and after the last step, on every rank.
        """
        from snaketron.model import backend
        from snaketron.model.distributed import distributed
        from snaketron.train.build import build_training
        from snaketron.train.loop import Trainer
        from snaketron.train.stopping import Stopped

        if launch.rank() == 0:
            self.write_config()
        run = backend.with_recorded_layers(self.settings, self.run, self.tokenizer.vocab_size)
        recorded = backend.records_micro_batches(self.settings, run)
        graphs = "micro-batches" if recorded else "attention and Mamba layers" if run.cuda_graphs else ""
        how = f", with CUDA graphs of {graphs}" if graphs else ""
        logger.info("%s: building the model%s", self.settings.stage, how)
        with distributed(self.settings.seed, run, recorded=recorded, smaller=self._smaller()):
            trainer = Trainer(build_training(self.settings, run, self.tokenizer.vocab_size))
            self._begin(trainer, optimizer_of_base=optimizer_of_base)
            try:
                batches = make_batches(self)

                def answer_now() -> None:
                    answer(trainer.built, trainer.iteration, batches)

                trainer.train(batches, self.version.directory, answer_now)
            except Stopped:
                return launch.SAVED
            seconds = trainer.seconds
        if launch.rank() == 0:
            self._finish(seconds, batches)
        return 0

    def _smaller(self) -> str:
        """What takes less memory of a GPU, and trains the same."""
        section = self.settings.stage.partition("/")[0]
        several = self.run.micro_batch_size > 1 and not self.settings.packed
        first = f"a lower {section}.micro_batch_size ({self.run.micro_batch_size}), " if several else ""
        return f"{first}more in {section}.recompute, or larger sizes in {section}.parallel"

    def _begin(self, trainer: Trainer, *, optimizer_of_base: bool) -> None:
        """Load the newest checkpoint of this version, or else the base, and say so."""
        stage, directory = self.settings.stage, self.version.directory
        parameters = sum(p.numel() for p in trainer.model.parameters())
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        adapters = trainer.built.adapters
        if self.base:
            logger.info("%s: loading %s", stage, self.base)
        if adapters and self.base:  # their checkpoints do not hold the frozen weights
            trainer.start_from(self.base, optimizer_of_base=False)
        if trainer.resume(directory):
            logger.info("%s: continues after step %d", stage, trainer.iteration)
        elif self.base and not adapters:
            trainer.start_from(self.base, optimizer_of_base=optimizer_of_base)
        logger.info(
            "%s: %s parameters on this rank%s, in %s",
            stage,
            f"{parameters:,}",
            f", {trained:,} of them trained" if trained < parameters else "",
            directory,
        )

    def publish(self) -> None:
        """Let the output, a link, lead to this version, which is complete."""
        self.version.publish(self.output)
        logger.info("%s: %s is %s", self.settings.stage, self.output, self.version.directory)

    def write_config(self) -> None:
        """Write what this version is to it, with the files of the tokenizer."""
        settings, run = self.settings.model_dump(), self.run.model_dump()
        Description(settings, self.inputs, self.tokenizer.sha256, run).write(self.version.config)
        copy_tokenizer(self.tokenizer_directory, self.version.tokenizer)

    def _finish(self, seconds: float, batches: Batches) -> None:
        """Record what a finished training did."""
        lines, _ = read_metrics(self.version.metrics)
        valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
        iterations = self.settings.train_iters
        self.write_record(
            {
                "iterations": iterations,
                "tokens": iterations * self.settings.global_batch_size * self.settings.seq_length,
                "valid_loss_before": valid[0] if valid else None,
                "valid_loss_after": valid[-1] if valid else None,
                "test_loss": next((line["test_loss"] for line in lines if "test_loss" in line), None),
                "train_seconds": round(seconds, 2),
                **mix(lines, batches.wanted()),
                **performance(lines),
                **({"continues": read_json(origin)} if (origin := self.version.origin).exists() else {}),
            }
        )

    def write_record(self, counts: dict[str, Any]) -> None:
        """Write the record of the last checkpoint, which says that the version is complete."""
        final = self.version.iteration_directory(self.settings.train_iters)
        stage, record = self.settings.stage, self.version.record
        with making("checkpoint", stage, outputs={}, record=record, started=self.started) as job:
            written = sorted(p for p in final.rglob("*") if p.is_file())
            size = sum(path.stat().st_size for path in written)
            logger.info("%s: hashing the last checkpoint (%s)", stage, size_text(size))
            job.present = [self._hashed(str(p.relative_to(final)), p) for p in written]
            job.inputs = {entry.name: entry for entry in self.inputs}
            job.settings, job.counts, job.key = self.settings.model_dump(), counts, self.key
            job.hardware, job.cost = self._share()

    def _hashed(self, name: str, path: Path) -> Entry:
        heartbeat.touch(self.version.heartbeat)  # a checkpoint of a terabyte takes longer than `step_timeout`
        return of_file(name, path)

    def _share(self) -> tuple[dict[str, int], dict[str, float]]:
        """The nodes and processes, and the time of the GPUs, or else CPUs, that all attempts had."""
        nodes, per_node, _ = layout(self.run, self.run.cluster)
        before = sum(attempt.seconds or 0 for attempt in read_attempts(self.version.attempts))
        seconds = time.monotonic() - self.started + before
        processes = nodes * per_node
        if self.run.cluster.gpus_per_node:
            cost = {"gpu_seconds": round(seconds * processes, 1)}
        else:
            cost = {"cpu_seconds": round(seconds * processes * self.run.cpus_per_task, 1)}
        return {"nodes": nodes, "processes": processes}, cost


def has_optimizer(base: Path | None) -> bool:
    """Whether a checkpoint was trained here and has its optimizer's state; others have weights alone."""
    if base is None:
        return False
    trained: int = Version(base).describe().settings["train_iters"]
    if not trained:
        logger.info("%s: comes from elsewhere without the optimizer's state, so AdamW begins anew", base)
    return trained > 0


def check_base(base: Path, model: Model, tokenizer_sha256: str) -> None:
    """`UserError` unless a checkpoint is of this architecture, with this tokenizer."""
    config = Version(base).describe()
    if config.stage == "lora":
        raise UserError(
            f"{base} holds adapters and not the model: merge them (`snakemake ckpt/lora_merged`), "
            "and start from that"
        )
    differ = model_differences(config.settings["model"], model)
    if config.tokenizer_sha256 != tokenizer_sha256:
        differ.append(
            f"the tokenizer: sha256 {config.tokenizer_sha256[:12]} in the checkpoint, "
            f"{tokenizer_sha256[:12]} here"
        )
    if differ:
        raise UserError(f"{base} is a checkpoint of another model:\n" + "\n".join(differ))


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
