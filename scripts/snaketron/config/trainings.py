"""The one list of the trainings that a configuration describes.

Checks, estimates, settings, requests to Slurm and the plan of a dry-run are made for each entry of it, so
a further stage, or a phase with values of its own, is added here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snaketron.config.training import Adapters, Model, Phase, Pretrain, Tuning

if TYPE_CHECKING:
    from snaketron.config import Config


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: a phase of pretraining, SFT or LoRA.

    `run` has the values that hold for this training: a phase's own ones are already in the place of those
    of `pretrain`.
    """

    section: str  # of the configuration; the rule that runs the training has the same name
    phase: str = ""  # the wildcard of the rule of pretraining; the other rules have none
    model: Model
    run: Pretrain | Tuning
    seq_length: int
    global_batch_size: int
    train_iters: int
    elsewhere: Mapping[str, str]  # paths of the keys that do not stand in `section` itself
    constant_rate: bool = False  # whether the schedule of pretraining passes over this phase
    on_request: bool = False  # checked against the model and the GPUs only when its rule is to run

    @property
    def name(self) -> str:
        """The directory below <ckpt> that holds the result: pretrain/broad, sft, lora."""
        return f"{self.section}/{self.phase}" if self.phase else self.section

    @property
    def tokens(self) -> int:
        """Tokens of all steps, padding of packs included."""
        return self.train_iters * self.global_batch_size * self.seq_length

    @property
    def packed(self) -> bool:
        """Whether it trains on packs of conversations."""
        return isinstance(self.run, Tuning)

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that it trains; None where it trains the model itself."""
        return self.run if isinstance(self.run, Adapters) else None

    def at(self, key: str) -> str:
        """Where the configuration has a key of this training, for messages.

        Of the first phase these are `pretrain.phases[0].seq_length` and `pretrain.parallel`.
        """
        return self.elsewhere.get(key, f"{self.section}.{key}")


def trainings(config: Config) -> list[Training]:
    """The trainings in the order in which they run."""
    found = [_phase(config, index) for index in range(len(config.pretrain.phases))]
    tunings: list[tuple[str, Tuning]] = [("sft", config.sft), ("lora", config.lora)]
    return found + [
        Training(
            section=section,
            model=config.model.model_copy(update={"precision": run.precision or config.model.precision}),
            run=run,
            seq_length=config.sft_data.pack_size,
            global_batch_size=run.global_batch_size,
            train_iters=run.train_iters,
            elsewhere={"seq_length": "sft_data.pack_size"}
            | ({} if run.precision else {"precision": "model.precision"}),
            on_request=section == "lora",
        )
        for section, run in tunings
    ]


def _phase(config: Config, index: int) -> Training:
    """A phase of pretraining: a key of `pretrain` or `model` that it has and that is not null is its own."""
    pretrain, phase = config.pretrain, config.pretrain.phases[index]
    given = {key: getattr(phase, key) for key in Phase.model_fields if getattr(phase, key) is not None}
    own: dict[str, Any] = {key: value for key, value in given.items() if key in Pretrain.model_fields}
    if phase.parallel:
        sizes = {key: getattr(phase.parallel, key) for key in phase.parallel.model_fields_set}
        own["parallel"] = pretrain.parallel.model_copy(update=sizes)
    if rate := phase.learning_rate:
        constant = {"learning_rate": rate, "min_learning_rate": rate}
        own["optimizer"] = pretrain.optimizer.model_copy(update=constant)
    of_model = {key: value for key, value in given.items() if key in Model.model_fields}
    train_iters, global_batch_size, seq_length = pretrain.steps(phase)
    at = f"pretrain.phases[{index}]"
    return Training(
        section="pretrain",
        phase=phase.name,
        model=config.model.model_copy(update=of_model) if of_model else config.model,
        run=pretrain.model_copy(update=own),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        train_iters=train_iters,
        constant_rate=phase.learning_rate is not None,
        elsewhere={"precision": "model.precision"} | {key: f"{at}.{key}" for key in given},
    )
