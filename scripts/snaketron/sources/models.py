"""Repositories of the Hugging Face hub that are used as they are: tokenizers, checkpoints, data of tasks.

The lock file pins their commits and files, as it does for sources. Rule download_model fetches the files of a
model that are used to <data>/hub/OWNER/NAME/, and rule download_task_data a data set of an evaluation's task.
Every job reads this: nothing but the standard library, and nothing that asks the network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from snaketron.config import Config, ConfigError
from snaketron.sources.lockfile import Lock, LockedFile

_ID = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*))?")
_SUFFIX = "safetensors|json|jinja|model|tiktoken|txt"
# The files of a model that are listed: weights, configurations, vocabularies and templates in its root. The
# record of a downloaded file, FILE.json, never matches, because a name does not end in two of the suffixes
# (the first word of model.safetensors is none).
MODEL_FILE = rf"(?:[^/.]+|(?:[^/.]+\.)+(?!(?:{_SUFFIX})\.)[^/.]+)\.(?:{_SUFFIX})"
TOKENIZER = re.compile(  # config.json tells the class of a tokenizer that does not tell it itself
    r"(?:config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(?:vocab|merges)\.txt|chat_template\.jinja|.*\.(?:model|tiktoken)"
)
CHECKPOINT = re.compile(r"(?:config|generation_config|tokenizer)\.json|.*\.safetensors(?:\.index\.json)?")


# The files of a data set that are listed, in any directory. README.md assigns them to configurations.
TASK_FILE = (
    r"README\.md|(?:[^/.][^/]*/)*[^/.][^/]*"
    r"\.(?:(?:jsonl?|ndjson|csv|tsv|txt)(?:\.(?:gz|zst|bz2|xz))?|parquet|arrow)"
)
DATA = re.compile(TASK_FILE)
# What any repository of a kind has.
_USUAL = {
    "model": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "dataset": ("README.md",),
}


class HubRepository(NamedTuple):
    """What one key of the configuration takes from a repository of the hub."""

    path: str  # OWNER/NAME or OWNER/NAME@REVISION, as it is configured
    where: str  # the key
    wanted: re.Pattern[str]  # names of the files that it needs
    kind: Literal["model", "dataset"] = "model"

    @property
    def name(self) -> str:
        """Under which the lock file lists it. A model and a data set may have one name on the hub."""
        return self.path if self.kind == "model" else f"datasets/{self.path}"

    @property
    def request(self) -> dict[str, str]:
        """What decides on the files that are listed."""
        repository, _, revision = self.path.partition("@")
        return {self.kind: repository, "revision": revision or "main"}

    def place(self, lock: Lock) -> str:
        """Where its files are downloaded to, below <data>/hub; `ConfigError` where a data set is not listed.

        That of a data set names its commit: its files are read as a whole, so no file of another commit may
        lie there, and tasks are asked again when the lock file names another one.
        """
        if self.kind == "model":
            return self.path
        self._check(lock)
        commit = lock.models[self.name]["revision"] if self.name in lock.models else "unlisted"
        return f"datasets/{self.request['dataset']}@{commit}"

    def directory(self, config: Config) -> str:
        """Where the files of a model are downloaded to."""
        return f"{config.pathvars['data']}/hub/{self.path}"

    def files(self, lock: Lock) -> list[str]:
        """The downloaded files that it needs; `ConfigError` when they are not listed for this request."""
        return [f"<data>/hub/{self.place(lock)}/{file.name}" for file in self.listed(lock)]

    def listed(self, lock: Lock) -> list[LockedFile]:
        """The files of the repository that are used, as the lock file lists them."""
        self._check(lock)
        return [file for name, file in lock.model_files(self.name).items() if self.wanted.fullmatch(name)]

    def _check(self, lock: Lock) -> None:
        """Raise `ConfigError` unless it was listed as it is configured now."""
        entry = lock.models.get(self.name)
        if entry is None or entry["request"] != self.request:
            kind = "model" if self.kind == "model" else "data set"
            said = (
                f"{self.where}: {self.path} is no directory here, and as a {kind} of the hub it is not "
                f"listed in {lock.path} yet. Correct it, or list it, and commit the file:\n  {lock.command}"
            )
            if entry is not None or not lock.assume(self.name, _USUAL[self.kind], said):
                raise ConfigError(said)


def hub_model(path: str | None, where: str, wanted: re.Pattern[str]) -> HubRepository | None:
    """The model of the hub that a key names; None for a directory of this machine, and for no path."""
    return HubRepository(path, where, wanted) if path is not None and _is_id(path) else None


def _is_id(path: str) -> bool:
    """Whether a path is a repository of the hub, and no directory here."""
    return not Path(path).is_dir() and _ID.fullmatch(path) is not None


def hub_repositories(config: Config) -> list[HubRepository]:
    """All models and data sets of the hub that a configuration names."""
    bases = [base_model(path, key) for key, path in base_keys(config).items()]
    models = [m for m in [tokenizer_model(config), *bases] if m is not None]
    return [*models, *task_data(config).values()]


def task_data(config: Config) -> dict[str, HubRepository]:
    """The data sets of the hub that tasks of the evaluation ask from, by the `data` of the tasks."""
    found: dict[str, HubRepository] = {}
    for i, task in enumerate(config.eval.tasks):
        if task.data and _is_id(task.data):
            found.setdefault(task.data, HubRepository(task.data, f"eval.tasks[{i}].data", DATA, "dataset"))
    return found


def base_keys(config: Config) -> dict[str, str]:
    """The checkpoints of elsewhere that a configuration names, by their keys."""
    sections = {"pretrain": config.pretrain.base, "sft": config.sft.base, "lora": config.lora.base}
    named = {f"{section}.base": path for section, path in sections.items()}
    named |= {f"pretrain.phases[{i}].checkpoint": p.checkpoint for i, p in enumerate(config.pretrain.phases)}
    return {key: path for key, path in named.items() if path}


def base_model(path: str | None, where: str) -> HubRepository | None:
    """The model of the hub that trainings begin with; None for random weights, or a directory."""
    return hub_model(path, where, CHECKPOINT)


def tokenizer_model(config: Config) -> HubRepository | None:
    """The model of the hub whose tokenizer is used; None for a trained one, or one of this machine."""
    return hub_model(config.tokenizer.path, "tokenizer.path", TOKENIZER)
