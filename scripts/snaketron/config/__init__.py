"""The configuration: one model, every key with its default, unit and how to choose it.

`config/config.yaml` and `config/schema.json` are generated from these classes (`write`), and the
Snakefile checks what the user gives with `load`.
Nothing heavier than pydantic is imported here: every Slurm job parses the Snakefile.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

from snaketron.config.base import NAME, ConfigError, Section, Seed, Text, closest, key, suggest
from snaketron.config.checks import (
    SECRET,
    check_blends,
    check_curriculum,
    check_environment,
    check_given,
    check_model,
    check_reasoning,
    check_references,
    check_sources,
    check_splits,
    check_tokenizer,
    duplicates,
)
from snaketron.config.cluster import Cluster, Parallel
from snaketron.config.containers import check_container
from snaketron.config.curation import FILTERS, Curation, CurationData, Filter, MinHash
from snaketron.config.data import (
    ChatSource,
    Corpus,
    Hub,
    PretrainData,
    Reasoning,
    SftData,
    Tokenizer,
    sample_chats,
    sample_corpora,
)
from snaketron.config.doubled import doubled
from snaketron.config.evaluation import Evaluation
from snaketron.config.names import check_paths, check_roots
from snaketron.config.training import (
    Adapters,
    Lora,
    Model,
    Optimizer,
    Phase,
    Pretrain,
    Run,
    Sft,
    Tuning,
)
from snaketron.config.training_checks import check_evaluation, check_training
from snaketron.config.trainings import Training, trainings
from snaketron.log import PLAIN

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

__all__ = [
    "FILTERS",
    "SECRET",
    "Adapters",
    "ChatSource",
    "Cluster",
    "Config",
    "ConfigError",
    "Corpus",
    "Curation",
    "Evaluation",
    "Filter",
    "Hub",
    "Lora",
    "MinHash",
    "Model",
    "Optimizer",
    "Parallel",
    "Phase",
    "Pretrain",
    "Reasoning",
    "Run",
    "Section",
    "Sft",
    "Training",
    "Tuning",
    "load",
]

ENVIRONMENT_PREFIX = "SNAKETRON_"
ArtifactKind = Literal[
    "raw-data",
    "tokenizer",
    "pretraining-blend",
    "sft-data",
    "pretrained-model",
    "sft-model",
    "lora-adapters",
]


class Notify(Section):
    command: list[str] = key(
        list,
        "words of a command that gets facts as JSON on its standard input when the workflow has finished or "
        "failed and when a training has stalled (step_timeout); no shell reads them. Empty: nobody is told",
    )


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


Root = Literal["data", "ckpt", "hf", "eval", "logs", "benchmarks"]
_ROOTS: dict[Root, str] = {"data": "data", "ckpt": "ckpt", "hf": "hf", "eval": "eval"}


def _complete(roots: dict[Root, str]) -> dict[Root, str]:
    """All roots, as Snakemake compares paths: without `./` before them and `/` after them."""
    return {name: str(Path(root)) for name, root in (_ROOTS | roots).items()}


class Config(Section):
    pathvars: Annotated[dict[Root, Text], AfterValidator(_complete)] = key(
        lambda: dict(_ROOTS),
        "roots of the outputs, also of `logs` and `benchmarks`; move them to a parallel file system here, or "
        "keep two configurations apart",
    )
    seed: Seed = key(1234, "seed of initial weights, shuffling and sampling")
    tracking: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)] = key(
        "off",
        "Weights & Biases: off, offline (below ./wandb, for `wandb sync`) or online (needs WANDB_API_KEY); "
        "docs/tracking.md",
    )
    tracking_upload: list[ArtifactKind] = key(
        list,
        "kinds of W&B artifacts whose files are sent too, such as lora-adapters; of the others it gets "
        "names, sizes, hashes and addresses",
    )
    tensorboard: bool = key(
        False,
        "write the metrics for TensorBoard as well, to tensorboard/ of the version (extra `tensorboard`)",
    )
    notify: Notify = key(Notify, "whom to tell")
    tokenizer: Tokenizer = key(Tokenizer, "trained from text, or taken from a path")
    sources_lock: Text = key(
        "sources.lock.json", "what scripts/lock_sources.py writes: the files of sources that lie elsewhere"
    )
    corpora: list[Corpus] = Field(default_factory=sample_corpora, description="text for pretraining")
    curation: CurationData = key(CurationData, "what the curation of all corpora shares")
    pretrain_data: PretrainData = key(PretrainData, "from raw text to tokens")
    model: Model = key(Model, "the architecture")
    cluster: Cluster = key(Cluster, "the nodes that trainings run on")
    pretrain: Pretrain = key(Pretrain, "pretraining")
    chats: list[ChatSource] = Field(default_factory=sample_chats, description="conversations for SFT")
    sft_data: SftData = key(SftData, "from conversations to packs")
    sft: Sft = key(Sft, "supervised fine-tuning")
    lora: Lora = key(Lora, "LoRA: the same data, frozen weights, trained low-rank adapters")
    eval: Evaluation = key(Evaluation, "what eval/<stage>.json says of a checkpoint")

    @model_validator(mode="after")
    def limit(self) -> Self:
        """Give each source the limits of its section that it does not have itself."""
        for data, sources in ((self.pretrain_data, self.corpora), (self.sft_data, self.chats)):
            for source in sources:
                for limit in ("max_files", "max_documents"):
                    if getattr(source, limit) is None and getattr(data, limit) and not source.registered:
                        setattr(source, limit, getattr(data, limit))
        return self

    @model_validator(mode="after")
    def check(self) -> Self:
        """Everything that one key alone cannot show, with both numbers in the message."""
        problems = [
            *duplicates("corpora", [c.name for c in self.corpora]),
            *duplicates("chats", [c.name for c in self.chats]),
            *duplicates("pretrain.phases", [p.name for p in self.pretrain.phases]),
            *check_references(self),
            *check_blends(self),
            *check_sources(self),
            *check_reasoning(self),
            *check_tokenizer(self.tokenizer),
            *check_paths(self),
            *check_roots(self),
            *check_model(self.model),
            *check_environment(self.cluster),
            *check_container(self.cluster, Path.cwd()),
            *check_splits(self),
            *check_curriculum(self.pretrain),
            *check_given(self.pretrain),
            *check_evaluation(self),
            *(problem for training in self.trainings() for problem in check_training(training, self)),
        ]
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))  # phases share most of their keys
        return self

    def sources(self) -> list[tuple[str, Corpus | ChatSource]]:
        """Every source of text and of conversations, after the key at which it stands."""
        return [
            *((f"corpora[{i}]", corpus) for i, corpus in enumerate(self.corpora)),
            *((f"chats[{i}]", source) for i, source in enumerate(self.chats)),
        ]

    def data_of(self, source: Corpus | ChatSource) -> PretrainData | SftData:
        """What becomes of the rows of a source."""
        return self.pretrain_data if source.section == "pretrain_data" else self.sft_data

    def trainings(self) -> list[Training]:
        """Every training, in the order in which they run."""
        return trainings(self)

    def training(self, name: str) -> Training:
        """The training whose result is <ckpt>/`name`: pretrain/broad, sft, lora; else `KeyError`."""
        return {training.name: training for training in self.trainings()}[name]


def load(
    values: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    arguments: Iterable[str] = (),
) -> Config:
    """Check the merged configuration of Snakemake and return it typed.

    `arguments` are the words of --config. Snakemake takes each value in their lists and sections for text, so
    that `null` were a name and `false` true; here they are the YAML that a file would have.
    `SNAKETRON_SFT__TRAIN_ITERS=10` in the environment sets `sft.train_iters` over every file.
    Raises `ConfigError` with one line for each problem.
    """
    merged = _plain(values)
    for word in arguments:
        name, _, text = word.partition("=")
        with contextlib.suppress(yaml.YAMLError):  # then it is text for Snakemake too
            if isinstance(value := _plain(yaml.safe_load(text)), dict | list):
                _merge(merged, name, value)
    variables = sorted(n for n in environment if n.startswith(ENVIRONMENT_PREFIX) and n != PLAIN)
    paths = {name: tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")) for name in variables}
    if problems := [line for name, path in paths.items() if (line := _divided_elsewhere(name, path))]:
        raise ConfigError("\n".join(problems))
    given: dict[tuple[Any, ...], str] = {}  # by the path of a key, the variable that sets it
    for name, path in paths.items():
        given |= dict.fromkeys(_set(merged, path, name, environment[name]), name)
    text = json.dumps(merged, ensure_ascii=False)
    try:
        text.encode()
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) + _given(e, given) for e in error.errors())) from None
    except UnicodeEncodeError as error:
        where = text[max(0, error.start - 40) : error.end + 40]
        raise ConfigError(f"the configuration holds text that is not UTF-8: {where!r}") from None


def _divided_elsewhere(variable: str, path: tuple[str, ...]) -> str | None:
    """Say it where two underscores are missing between names of sections and keys, or stand inside one."""
    known = {"_".join(key): key for key in _paths(Config)}
    right = known.get("_".join(path), path)
    if right == path:
        return None
    name = ENVIRONMENT_PREFIX + "__".join(right).upper()
    return f"environment variable {variable}: two underscores divide sections and keys: {name}"


def _paths(section: Any) -> Iterator[tuple[str, ...]]:
    """The path of each section and key below a section; of sections in a list as in the first one."""
    for name, field in section.model_fields.items():
        yield (name,)
        if inner := _section(field.annotation):
            at = f"{name}[0]" if get_origin(field.annotation) is list else name
            yield from ((at, *path) for path in _paths(inner))


def _section(annotation: Any) -> Any:
    """The section that a key holds, alone or in a list; None where it holds a value."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)


def _plain(value: Any) -> Any:
    """A value of YAML as JSON has it: dates are text, and so are keys that are numbers."""
    return json.loads(json.dumps(value, default=str))


def _set(
    values: dict[str, Any], path: tuple[str, ...], variable: str, text: str
) -> Iterator[tuple[Any, ...]]:
    """Set the key at a path to the YAML value of a variable of the environment; the paths of what is set."""
    try:
        value = _plain(yaml.safe_load(text))
    except yaml.YAMLError:
        raise ConfigError(f"environment variable {variable}: {text!r} is not YAML") from None
    if problems := doubled(text, f"environment variable {variable}", lines=False):
        raise ConfigError("\n".join(problems))
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"environment variable {variable}: {name!r} is not a section")
    _merge(values, path[-1], value)
    return _keys(path, value)


def _keys(path: tuple[Any, ...], value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of a key, or of each key in its section."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _keys((*path, name), inner)
    else:
        yield path


def _merge(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a key; of a section the keys that are given, as Snakemake merges files."""
    if isinstance(value, dict) and isinstance(values.get(name), dict):
        for inner, one in value.items():
            _merge(values[name], inner, one)
    else:
        values[name] = value


def _given(error: ErrorDetails, given: Mapping[tuple[Any, ...], str]) -> str:
    """The variable of the environment that has set the key of an error, or a key of an unknown section."""
    at, unknown = error["loc"], error["type"] == "extra_forbidden"
    for path, name in given.items():
        if at[: len(path)] == path or (unknown and path[: len(at)] == at):
            return f" (environment variable {name})"
    return ""


def _explain(error: ErrorDetails) -> str:
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{_meant(error['loc'])}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "model_type" and error["input"] is None:  # all of its lines may be comments
        return f"{path}: holds no key; leave it out"
    given = error["input"]
    word = json.dumps(given) if given is None or isinstance(given, bool) else repr(given)  # as YAML has it
    return f"{path}: {_wrong(error)} (it is {word})"


def _wrong(error: ErrorDetails) -> str:
    """What a value should be; in words of the configuration where pydantic's are those of a programmer."""
    said = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "model_type":
        return f"input should be keys with values, such as {{{sorted(_keys_at(error['loc']))[0]}: ...}}"
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == NAME:
        return "a name may hold a to z, 0 to 9 and _ alone"
    if error["type"] == "int_parsing" and (number := _whole(str(error["input"]))):
        return f"to YAML this is text; write {number:_}"
    return said


def _whole(text: str) -> int | None:
    """The whole number that a text such as 1e6 means; None where it means none."""
    try:
        return int(float(text)) if float(text).is_integer() else None
    except ValueError:
        return None


def _meant(path: tuple[str | int, ...]) -> str:
    """What an unknown key may mean: nearly the same one of its section, or the same one of another."""
    names = [str(name) for name in path if not isinstance(name, int)]
    here = _keys_at(path[:-1])
    found = [known for known in _paths(Config) if known[-1] == names[-1]]
    if closest(names[-1], here, cutoff=0.8) or not found:
        return suggest(names[-1], here)

    def nearness(known: tuple[str, ...]) -> tuple[int, int]:
        shared = zip(names, (name.removesuffix("[0]") for name in known), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], shared)), -len(known)

    nearest = max(map(nearness, found))
    return f"; did you mean {' or '.join('.'.join(k) for k in found if nearness(k) == nearest)}?"


def _keys_at(path: tuple[str | int, ...]) -> set[str]:
    """Names of the keys of the section at `path`."""
    section: Any = Config
    for name in path:
        if not isinstance(name, int):
            section = _section(section.model_fields[name].annotation)
    return set(section.model_fields)
