"""Models of the Hugging Face hub that the configuration names: a tokenizer, or a checkpoint to begin with.

The lock file pins their commits and files, as it does for data sets, and rule download_model fetches the
files that are used to <data>/hub/OWNER/NAME/. Every job reads this: nothing but the standard library, and
nothing that asks the network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from snaketron.config import Config
from snaketron.sources.lockfile import Lock, LockedFile

_ID = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*))?")
_SUFFIX = "safetensors|json|jinja|model|tiktoken|txt"
# The files of a model that are listed: weights, configurations, vocabularies and templates in its root. The
# record of a downloaded file, FILE.json, never matches, because a name does not end in two of the suffixes.
MODEL_FILE = rf"(?:[^/.]+\.)*(?!(?:{_SUFFIX})\.)[^/.]+\.(?:{_SUFFIX})"
TOKENIZER = re.compile(  # config.json tells the class of a tokenizer that does not tell it itself
    r"(?:config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(?:vocab|merges)\.txt|chat_template\.jinja|.*\.(?:model|tiktoken)"
)
CHECKPOINT = re.compile(r"(?:config|generation_config|tokenizer)\.json|.*\.safetensors(?:\.index\.json)?")


class HubModel(NamedTuple):
    """What one key of the configuration takes from a model of the hub."""

    path: (
        str  # OWNER/NAME or OWNER/NAME@REVISION, as it is configured; the lock file lists it under this name
    )
    where: str  # the key
    wanted: re.Pattern[str]  # names of the files that it needs

    @property
    def request(self) -> dict[str, str]:
        """What decides on the files that are listed."""
        repository, _, revision = self.path.partition("@")
        return {"model": repository, "revision": revision or "main"}

    def directory(self, config: Config) -> str:
        """Where its files are downloaded to."""
        return f"{config.pathvars.get('data', 'data')}/hub/{self.path}"

    def files(self, lock: Lock) -> list[str]:
        """The downloaded files that it needs; `ConfigError` when they are not listed for this request."""
        return [f"<data>/hub/{self.path}/{file.name}" for file in self.listed(lock)]

    def listed(self, lock: Lock) -> list[LockedFile]:
        """The same files as the lock file lists them."""
        lock.check_model(self.path, self.request, self.where)
        return [file for name, file in lock.model_files(self.path).items() if self.wanted.fullmatch(name)]


def hub_model(path: str | None, where: str, wanted: re.Pattern[str]) -> HubModel | None:
    """The model of the hub that a key names; None for a directory of this machine, and for no path."""
    if path is None or Path(path).is_dir():
        return None
    return HubModel(path, where, wanted) if _ID.fullmatch(path) else None


def hub_models(config: Config) -> list[HubModel]:
    """All models of the hub that a configuration names."""
    bases = [base_model(path, key) for key, path in base_keys(config).items()]
    return [m for m in [tokenizer_model(config), *bases] if m is not None]


def base_keys(config: Config) -> dict[str, str]:
    """The checkpoints of elsewhere that a configuration names, by their keys."""
    sections = {"pretrain": config.pretrain.base, "sft": config.sft.base, "lora": config.lora.base}
    named = {f"{section}.base": path for section, path in sections.items()}
    named |= {f"pretrain.phases[{i}].checkpoint": p.checkpoint for i, p in enumerate(config.pretrain.phases)}
    return {key: path for key, path in named.items() if path}


def base_model(path: str | None, where: str) -> HubModel | None:
    """The model of the hub that trainings begin with; None for random weights, or a directory."""
    return hub_model(path, where, CHECKPOINT)


def tokenizer_model(config: Config) -> HubModel | None:
    """The model of the hub whose tokenizer is used; None for a trained one, or one of this machine."""
    return hub_model(config.tokenizer.path, "tokenizer.path", TOKENIZER)
