"""A training stage as a program: from the command line to a published checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.config import Section
from snaketron.data import tokenizer as tokenizers
from snaketron.files import sha256, to_json, writing
from snaketron.jobs import launch, supervisor
from snaketron.jobs import version as versions
from snaketron.lineage import record as lineage
from snaketron.lineage.wandb import Tracker
from snaketron.log import UserError, log_to, logger
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings
from snaketron.train.metrics import Metrics, mix, performance

import yaml
from pydantic import ValidationError

if TYPE_CHECKING:  # imports megatron-core (5 s), which a finished version does not need
    from snaketron.train.batches import Batches
    from snaketron.train.build import BuiltModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Keys of the model that may differ from those of the checkpoint it starts from: no weight depends on them.
FREE = {
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "mtp_loss_scaling_factor",
    "init_method_std",
    "precision",
    "bf16_layers_at_end",
}


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both trainings have."""
    parser = argparse.ArgumentParser(description=description)
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


def parse_args(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    return argument_parser(description).parse_args(argv)


class Stage:
    """One stage with its inputs identified, in the supervisor and in each of its processes alike."""

    def __init__(self, args: argparse.Namespace, kind: type[TrainSettings] = TrainSettings) -> None:
        """`kind` is what `--settings` holds; `args.adapters`, where there is one, a checkpoint as well."""
        if launch.is_rank():
            launch.join()
        self.settings = _parse(kind, args.settings, "--settings")
        self.run = _parse(RunSettings, args.run_settings, "--run-settings")
        self.blend, self.base, self.output = args.blend, args.base, args.output
        self.tokenizer_directory = args.tokenizer
        self.tokenizer = tokenizers.info(args.tokenizer)
        self.rank = int(os.environ.get("RANK", 0))
        self.inputs = [
            {"path": str(self.blend), "sha256": _hash(self.blend)},
            {"path": str(args.tokenizer / "tokenizer.json"), "sha256": self.tokenizer.sha256},
        ]
        if self.base:
            self.inputs.append({"path": str(self.base), "version": versions.identity(self.base)})
            self._check_base()
        elif kind is LoraSettings:
            raise UserError("--base: name the checkpoint that the adapters are for")
        if adapters := getattr(args, "adapters", None):
            self.inputs.append({"path": str(adapters), "version": versions.identity(adapters)})
        identities = [i.get("sha256") or i["version"] for i in self.inputs]
        self.key = versions.version_key(self.settings.model_dump(), identities)
        self.directory = versions.version_directory(self.output, self.settings.stage, self.key)
        self.attempt = args.attempt
        if not _is_last_rank():
            logger.setLevel(logging.WARNING)
            return
        log_to(self.directory / "train.log", "a")
        if args.log_file:
            log_to(args.log_file, "a" if launch.is_rank() else "w")

    def _check_base(self) -> None:
        """The base must be the same architecture with the same tokenizer."""
        base = yaml.safe_load((self.base / "config.yaml").read_text())
        if base["settings"]["stage"] == "lora":
            raise UserError(
                f"{self.base} holds adapters and not the model: merge them (`snakemake ckpt/lora_merged`), "
                "and start from that"
            )
        theirs, ours = base["settings"]["model"], self.settings.model.model_dump()
        differ = [
            f"model.{key}: {theirs.get(key)} in the checkpoint, {ours[key]} in the configuration"
            for key in ours
            if key not in FREE and theirs.get(key) != ours[key]
        ]
        if base["tokenizer_sha256"] != self.tokenizer.sha256:
            differ.append(
                f"the tokenizer: sha256 {base['tokenizer_sha256'][:12]} in the checkpoint, "
                f"{self.tokenizer.sha256[:12]} here"
            )
        if differ:
            raise UserError(f"{self.base} is a checkpoint of another model:\n" + "\n".join(differ))

    @property
    def is_finished(self) -> bool:
        return versions.is_finished(self.directory)

    def train(
        self,
        make_batches: Callable[[Stage], Any],
        *,
        with_optimizer: bool,
        sample: Callable[[BuiltModel, int, Any], None] = lambda built, iteration, batches: None,
    ) -> int:
        """Train to the end, publish, and return the exit status.

        `with_optimizer` takes the optimizer's state from the base checkpoint as well. `sample` gets the model
        and its iteration before the first step, on the way and after the last step, on every rank.
        """
        from snaketron.model.distributed import distributed
        from snaketron.train.build import build_training
        from snaketron.train.loop import Stopped, Trainer

        if self.rank == 0:
            self.write_config()
        tracker = Tracker(
            self.run.tracking if _is_last_rank() else "off",
            self.directory,
            self.settings.stage,
            self.inputs,
            {"settings": self.settings.model_dump(), "run": self.run.model_dump()},
        )
        with distributed(self.settings.seed, self.run):
            trainer = Trainer(build_training(self.settings, self.run, self.tokenizer.vocab_size))
            parameters = sum(p.numel() for p in trainer.model.parameters())
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            adapters = trainer.built.adapters
            if adapters and self.base:  # which their checkpoints do not hold
                trainer.start_from(self.base, with_optimizer=False)
            if trainer.resume(self.directory):
                logger.info("%s: continues after step %d", self.settings.stage, trainer.iteration)
            elif self.base and not adapters:
                trainer.start_from(self.base, with_optimizer=with_optimizer)
            logger.info(
                "%s: %s parameters on this rank%s, in %s",
                self.settings.stage,
                f"{parameters:,}",
                f", {trained:,} of them trained" if trained < parameters else "",
                self.directory,
            )
            try:
                batches = make_batches(self)

                def answer() -> None:
                    sample(trainer.built, trainer.iteration, batches)

                trainer.train(batches, self.directory, answer, tracker.log)
            except Stopped:
                return launch.SAVED
            seconds = trainer.seconds
        if self.rank == 0:
            self._finish(seconds, batches)
        tracker.finish()
        return 0

    def publish(self) -> None:
        versions.publish(self.directory, self.output)
        logger.info("%s: %s is %s", self.settings.stage, self.output, self.directory)

    def write_config(self) -> None:
        with writing(self.directory / "config.yaml") as (temporary,):
            values = {
                "settings": self.settings.model_dump(),
                "run": self.run.model_dump(),
                "inputs": self.inputs,
                "tokenizer_sha256": self.tokenizer.sha256,
            }
            temporary.write_text(yaml.safe_dump(values, sort_keys=False))
        target = self.directory / "tokenizer"
        target.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.tokenizer_directory / name).exists():
                shutil.copyfile(self.tokenizer_directory / name, target / name)

    def _finish(self, seconds: float, batches: Batches) -> None:
        """Record what a finished training did."""
        lines = Metrics.read(self.directory / "metrics.jsonl")
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
            }
        )

    def write_record(self, counts: dict[str, Any]) -> None:
        """Write the record of the last checkpoint, which says that the version is complete."""
        final = versions.iteration_directory(self.directory, self.settings.train_iters)
        record = lineage.record(
            "checkpoint",
            self.settings.stage,
            inputs=self.inputs,
            outputs=sorted(p for p in final.rglob("*") if p.is_file()),
            settings=self.settings.model_dump(),
            counts=counts,
        )
        with writing(self.directory / versions.RECORD) as (temporary,):
            temporary.write_bytes(to_json(record | {"key": self.key}))


def _parse[S: Section](kind: type[S], text: str, option: str) -> S:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(f"{option}: {'; '.join(problems)}; paste what `snakemake -np` prints") from None


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def _is_last_rank() -> bool:
    """Whether this process speaks and writes metrics: `is_writer` before the processes are joined."""
    return int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1


def run_stage(stage: Stage, train: Callable[[], int]) -> int:
    """Supervise the training and publish it, or `train` as one of its processes; the exit status."""
    if launch.is_rank():
        with launch.telling(stage.directory):
            return train()
    status = supervisor.supervise(
        stage.settings.stage, stage.directory, stage.run, lambda: stage.is_finished, attempt=stage.attempt
    )
    if status == 0:
        stage.publish()
    return status
