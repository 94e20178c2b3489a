"""What one training is told: what defines its result, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any, Literal

from snaketron.config import (
    Adapters,
    Cluster,
    Config,
    Model,
    Optimizer,
    Pretrain,
    Run,
    Section,
    Training,
    Tuning,
)
from snaketron.config.data import SftData
from snaketron.settings import taken, unless
from snaketron.settings.schedule import Schedule

from pydantic import Field

TEMPLATE_DATE = SftData().template_date.isoformat()  # the default


class IndexSettings(Section):
    """Everything that, with the blend, defines the index of the samples of a training on text."""

    seed: int
    seq_length: int
    train_samples: int


class TrainSettings(Section):
    """Everything that, with the data and the base checkpoint, defines what a training produces."""

    stage: str
    seed: int
    # Draws the order of the text where a phase has a seed of its own; the training itself draws by `seed`.
    data_seed: int | None = unless(None)
    model: Model
    optimizer: Optimizer
    seq_length: int
    global_batch_size: int
    train_iters: int
    schedule: Schedule
    packed: bool = False  # whether samples are packs, which have padding
    loss_average: Literal["token", "sample"] = "token"
    switch_loss_average_after: int | None = None

    @property
    def index(self) -> IndexSettings:
        """What defines the index of its text."""
        seed = self.seed if self.data_seed is None else self.data_seed
        samples = self.train_iters * self.global_batch_size
        return IndexSettings(seed=seed, seq_length=self.seq_length, train_samples=samples)


class LoraSettings(TrainSettings):
    """`TrainSettings` for LoRA: the base is frozen, and its adapters are trained."""

    lora: Adapters


# Keys of the model that may differ between a training and the checkpoint it starts from: no weight depends
# on them.
FREE = {
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "mtp_loss_scaling_factor",
    "init_method_std",
    "precision",
    "bf16_layers_at_end",
}


def model_differences(there: Mapping[str, Any], model: Model) -> list[str]:
    """What keeps a training of `model` from starting from a checkpoint of the model `there`."""
    here = model.model_dump()
    return [
        f"model.{key}: {there.get(key)} in the checkpoint, {here[key]} in the configuration"
        for key in here
        if key not in FREE and there.get(key) != here[key]
    ]


def settings_of_checkpoint(values: dict[str, Any]) -> TrainSettings:
    """The settings that a checkpoint was trained with, as its config.yaml has them.

    They are `LoraSettings` where it holds adapters, and not where these are merged. Raises `ValidationError`
    where another version of Snaketron wrote them.
    """
    if values["stage"] == "lora":
        return LoraSettings.model_validate(values)
    return TrainSettings.model_validate({key: values[key] for key in values if key != "lora"})


class RunSettings(Run):
    """How a training is run; none of it changes the result."""

    cluster: Cluster = Field(default_factory=Cluster)
    tracking: Literal["off", "offline", "online"]
    tracking_upload: list[str] = Field(default_factory=list)
    tensorboard: bool = False
    notify: list[str] = Field(default_factory=list)
    cuda_graphs: bool | None = False  # as in an inference; a training has its own
    num_samples: int = 0
    sample_interval: int | None = None
    sample_tokens: int = 0
    # What the chat template was told when the conversations were rendered. It stays in the checkpoint's
    # config.yaml, so that whoever asks the checkpoint tells the template the same.
    template_date: str = unless(TEMPLATE_DATE)


def template_date(run: Mapping[str, Any]) -> date:
    """The date that the chat template of a checkpoint is told, by how the checkpoint was run."""
    return date.fromisoformat(run.get("template_date", TEMPLATE_DATE))


def train_settings(config: Config, name: str) -> TrainSettings:
    """What defines the result of a training: pretrain/broad, sft, lora. For adapters it is `LoraSettings`."""
    training = config.training(name)
    own: dict[str, Any] = {}
    if isinstance(training.run, Tuning):
        own["schedule"] = _cosine(training.run)
    else:
        own["schedule"] = _wsd(config.pretrain, training)
        seed = next(phase.seed for phase in config.pretrain.phases if phase.name == training.phase)
        own["data_seed"] = None if seed == config.seed else seed
    if training.adapters:
        own["lora"] = taken(Adapters, training.adapters)
    return taken(
        LoraSettings if training.adapters else TrainSettings,
        training.run,
        stage=name,
        seed=config.seed,
        model=training.model,
        seq_length=training.seq_length,
        global_batch_size=training.global_batch_size,
        train_iters=training.train_iters,
        packed=training.packed,
        **own,
    )


def _wsd(pretrain: Pretrain, training: Training) -> Schedule:
    """The part of the curriculum's schedule that a phase goes through.

    A phase that ends before the decay begins does not depend on how long the curriculum is, so a longer
    curriculum does not train it again.
    """
    increment = training.global_batch_size * training.seq_length
    if training.constant_rate:
        return Schedule(
            style="constant", start=0, warmup=0, end=training.tokens, decay=0, increment=increment
        )
    spans = pretrain.spans()
    start, end = spans[[phase.name for phase in pretrain.phases].index(training.phase)]
    total = spans[-1][1]
    decays = total - pretrain.decay_tokens < end
    return Schedule(
        style="WSD",
        start=start,
        warmup=pretrain.warmup_tokens,
        end=total if decays else max(end, pretrain.warmup_tokens + 1),
        decay=pretrain.decay_tokens if decays else 0,
        increment=increment,
    )


def _cosine(run: Tuning) -> Schedule:
    return Schedule(
        style="cosine", start=0, warmup=run.warmup_iters, end=run.train_iters, decay=0, increment=1
    )


def run_settings(config: Config, name: str) -> RunSettings:
    """How the training `name` is run."""
    day = config.sft_data.template_date.isoformat()
    run = config.training(name).run
    return taken(RunSettings, run, config, notify=config.notify.command, template_date=day)
