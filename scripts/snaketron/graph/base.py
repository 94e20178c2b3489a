"""The checkpoints from elsewhere that trainings begin with, and what differs from the configuration."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config import Config, ConfigError
from snaketron.graph.raw_files import RawFiles
from snaketron.graph.unknown import find
from snaketron.huggingface.config import differences, of_files, read_config, token_ids, unread
from snaketron.huggingface.index import cut_files, missing_files, read_index
from snaketron.huggingface.metadata import damaged_files, listed_tensors, megatron_differences
from snaketron.huggingface.names import megatron_tensors, tensors
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.settings.training import FREE, model_differences
from snaketron.sources.lockfile import Lock
from snaketron.sources.models import HubRepository, base_keys, base_model

_SHOWN = 20  # lines about one checkpoint


class Base(NamedTuple):
    """A checkpoint that `<section>.base` or the `checkpoint` of a phase names, and the keys that do."""

    path: str  # as it is configured
    keys: tuple[str, ...]
    hub: HubRepository | None

    @property
    def name(self) -> str:
        """The directory below <ckpt>/base that it is imported to: of its name, and a hash of its path."""
        words = re.sub(r"[^a-z0-9]+", "_", self.path.rstrip("/").rpartition("/")[2].lower()).strip("_")
        return f"{words[:40] or 'base'}_{hashlib.sha256(self.path.encode()).hexdigest()[:6]}"

    def directory(self, config: Config) -> Path:
        """Where its files lie, or will lie when they are downloaded."""
        return Path(self.hub.directory(config) if self.hub else self.path)

    def is_of_this_workflow(self, config: Config) -> bool:
        """Whether it is a finished checkpoint of a training, which needs no import."""
        version = Version(self.directory(config))
        return version.is_finished and version.config.exists()


class BaseGraph:
    """Answers about the bases. Raises `ConfigError` with everything in which they differ."""

    def __init__(self, config: Config, lock: Lock) -> None:
        self.config, self.lock = config, lock
        self.raw_files: RawFiles | None = None  # by the records of checkpoints, in the main process
        if problems := list(self._problems()):
            raise ConfigError("\n".join(problems))

    @cached_property
    def bases(self) -> dict[str, Base]:
        """By name."""
        keys: dict[str, list[str]] = {}
        for key, path in base_keys(self.config).items():
            keys.setdefault(path, []).append(key)
        found = [Base(path, tuple(names), base_model(path, names[0])) for path, names in keys.items()]
        return {base.name: base for base in found}

    def start(self, section: str) -> str | None:
        """The base that the first training of a section starts from; None where it has none."""
        for base in self.bases.values():
            if f"{section}.base" in base.keys:
                if base.is_of_this_workflow(self.config):
                    return base.path
                return f"<ckpt>/base/{base.name}"
        return None

    # Input functions get the wildcards of the job.

    def files(self, wildcards: Any) -> list[str]:
        """The files of a checkpoint, marked by what the record of its import says of them."""
        base = self._base(wildcards)
        if base.hub:  # rules make them
            return base.hub.files(self.lock)
        files, record = self._files(Path(base.path)), f"{self.stage(wildcards)}/record.json"
        return self.raw_files.seen_by(record, files) if self.raw_files else files

    def _base(self, wildcards: Any) -> Base:
        """The checkpoint that is imported: a base by its name, or the result of a phase."""
        if not hasattr(wildcards, "phase"):
            return find("base", wildcards.base, self.bases)
        phase = next(phase for phase in self.config.pretrain.phases if phase.name == wildcards.phase)
        return next(base for base in self.bases.values() if base.path == phase.checkpoint)

    def _files(self, directory: Path) -> list[str]:
        """Those that an import reads: of Megatron's iterations, the latest that is complete."""
        patterns = ("config.json", "*.safetensors*", ".metadata", "*.distcp", "common.pt", "tokenizer.json")
        nested = dict.fromkeys([directory, Version(directory).tensors or directory])
        return [str(path) for one in nested for pattern in patterns for path in sorted(one.glob(pattern))]

    # Params: a change runs the job again.

    def directory(self, wildcards: Any) -> str:
        return str(self._base(wildcards).directory(self.config))

    def model(self, _wildcards: Any) -> str:
        """What the checkpoint must agree with: keys on which no weight depends have their defaults."""
        return self.config.model.model_copy(
            update={key: type(self.config.model).model_fields[key].default for key in FREE}
        ).model_dump_json()

    def unread(self) -> Iterator[str]:
        """What the configurations of published checkpoints say and nobody reads, a sentence for each."""
        for base in self.bases.values():
            if not base.is_of_this_workflow(self.config) and (said := unread(self._config_of(base) or {})):
                yield f"{' and '.join(base.keys)}: {said}."

    def _config_of(self, base: Base) -> dict[str, Any] | None:
        """The config.json of a published checkpoint: as the lock file has it, or that of its directory."""
        listed = self.lock.models.get(base.hub.name, {}) if base.hub else {}
        directory = base.directory(self.config)
        if base.hub and "config" in listed and listed["request"] == base.hub.request:
            return of_files(dict(listed["config"]), directory)
        return read_config(directory) if (directory / "config.json").is_file() else None

    # Resources: a change runs nothing again.

    def stage(self, wildcards: Any) -> str:
        """What a checkpoint is imported as, below <ckpt>."""
        return f"pretrain/{wildcards.phase}" if hasattr(wildcards, "phase") else f"base/{wildcards.base}"

    def seq_length(self, wildcards: Any) -> int:
        """The longest sequences of the trainings that begin with it; those of a phase that it replaces."""
        if hasattr(wildcards, "phase"):
            return self.config.training(self.stage(wildcards)).seq_length
        keys = self._base(wildcards).keys
        return max(t.seq_length for t in self.config.trainings() if f"{t.section}.base" in keys)

    # ------------------------------------------------------------------------------------- differences

    def _problems(self) -> Iterator[str]:
        for base in self.bases.values():
            where = " and ".join(base.keys)
            directory = base.directory(self.config)
            if not base.hub and not directory.is_dir():
                yield f"{where}: {base.path!r} is no directory, and no OWNER/NAME of the Hugging Face hub"
                continue
            try:
                for problem in self._differences(base, directory):
                    yield f"{where}: {problem}"
            except UserError as error:  # a file that cannot be read
                yield f"{where}: {error}"

    def _differences(self, base: Base, directory: Path) -> Iterator[str]:
        model, vocabulary = self.config.model, self.config.tokenizer.vocab_size
        if base.is_of_this_workflow(self.config):
            trained = Version(directory).describe()
            if os.path.normpath(base.path) in self._made_from(base):
                version = os.path.relpath(directory.resolve())
                yield (
                    f"{base.path} is made from it; name the version that it leads to now, {version}, or give "
                    "this configuration another pathvars.ckpt"
                )
            if trained.stage == "lora":
                yield f"{base.path} holds adapters and not the model; name its lora_merged"
            yield from model_differences(trained.settings.get("model") or {}, model)
            yield from _damage(directory)
        elif (published := self._config_of(base)) is not None:
            yield from differences(published, model, vocabulary)
            if not base.hub:  # a rule downloads those of the hub
                yield from _lost_weights(directory)
            yield from self._tokenizer(base, directory)
        elif base.hub:  # not listed; the import compares
            yield from self._tokenizer(base, directory)
        elif not list(directory.glob("iter_*")) and not (directory / ".metadata").exists():
            yield f"{base.path} is no checkpoint: neither config.json nor .metadata nor iter_* is there"
        else:
            yield from self._megatron(directory)

    def _made_from(self, base: Base) -> set[str]:
        """The published checkpoints of this configuration that are made from a base."""
        sections = {key.partition(".")[0] for key in base.keys}
        if "pretrain" in sections:
            sections |= {name for name in ("sft", "lora") if not getattr(self.config, name).base}
        names = {training.name for training in self.config.trainings() if training.section in sections}
        names |= {"lora_merged"} if "lora" in sections else set()
        return {os.path.normpath(f"{self.config.pathvars['ckpt']}/{name}") for name in names}

    def _megatron(self, directory: Path) -> Iterator[str]:
        """What the list of the tensors of a checkpoint of Megatron says; the weights are not read."""
        model, tokenizer = self.config.model, self.config.tokenizer
        if (found := Version(directory).tensors) is None:
            latest = Version(directory).latest
            problem = "the checkpoint that it names is not there" if latest.exists() else "no such file"
            yield f"{latest}: {problem}; name the directory of one iteration, iter_*"
            return
        vocab_size = tokenizer.vocab_size if tokenizer.path is None else None
        wanted = megatron_tensors(tensors(model, tokenizer.vocab_size), {})
        problems = damaged_files(found) + megatron_differences(listed_tensors(found), wanted, vocab_size)
        yield from _first(problems, found)

    def _tokenizer(self, base: Base, directory: Path) -> Iterator[str]:
        """What can be said before the tokenizer of the trainings is made."""
        path, there = self.config.tokenizer.path, directory / "tokenizer.json"
        if path is None:
            made = Path(self.config.pathvars["data"]) / "tokenizer/tokenizer.json"
            if there.exists() and made.exists() and token_ids(there) == token_ids(made):
                return
            if there.exists() or base.hub:
                of_hub = " (a model of the hub: there is no such directory here)" if base.hub else ""
                yield (
                    f"the configuration trains a tokenizer (tokenizer.path: null), and {base.path}{of_hub} "
                    f"comes with another; set tokenizer.path: {base.path}"
                )
        elif path != base.path and there.exists() and (own := Path(path) / "tokenizer.json").exists():
            here, wanted = token_ids(own), token_ids(there)
            if count := sum(here.get(token) != number for token, number in wanted.items()):
                yield (
                    f"tokenizer.path {path}: {count} of the {len(wanted)} tokens of the checkpoint have "
                    f"another id there; set tokenizer.path: {base.path}"
                )


def _first(problems: list[str], directory: Path) -> Iterator[str]:
    """The first of some problems with a directory, and how many there are beside them."""
    yield from problems[:_SHOWN]
    if len(problems) > _SHOWN:
        yield f"and {len(problems) - _SHOWN} more in {directory}"


def _lost_weights(directory: Path) -> Iterator[str]:
    """The files of weights that are not there or not whole, by their index and heads; no tensor is read."""
    index, problems = read_index(directory)
    problems += missing_files(directory, index) + cut_files(directory)
    yield from _first([f"{directory}: {problem}" for problem in problems], directory)


def _damage(directory: Path) -> Iterator[str]:
    """What a finished checkpoint of this workflow has lost since."""
    if found := Version(directory).tensors:
        yield from damaged_files(found)[:_SHOWN]
    else:
        yield f"{directory}: its last step is not there; restore it"
