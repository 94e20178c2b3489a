"""What of the user's files is wrong before the first job, though each source of text by itself is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from snaketron import credentials
from snaketron.config import ChatSource, Config, ConfigError, Corpus, Section
from snaketron.lineage.record import Record, read
from snaketron.log import UserError
from snaketron.settings.blends import BlendSettings, blend_settings, phase_settings
from snaketron.settings.chats import render_settings
from snaketron.settings.curation import filter_settings
from snaketron.settings.text import tokenize_settings
from snaketron.sources.lockfile import Lock
from snaketron.sources.models import tokenizer_model
from snaketron.sources.pairs import MAX_SHARDS

type Sources = Mapping[str, tuple[str, Corpus | ChatSource]]  # by name, with the key of each

LONGEST_ARGUMENT = 131_071  # bytes: MAX_ARG_STRLEN of Linux, without the zero at the end
ONE_SOURCE = "make one source of several: its `paths` may be many"

# What does not say which rows of a file are read, nor what becomes of them.
_OTHER = {
    "name",
    "split",
    "paths",
    "hub",
    "max_files",
    "max_documents",
    "max_tokens",
    "metadata_fields",
    "curation",
    "tokens",
    "packs",
}


def check_files(
    config: Config,
    text: Mapping[str, Mapping[str, Sequence[str]]],
    conversations: Mapping[str, Mapping[str, Sequence[str]]],
    lock: Lock,
) -> None:
    """`ConfigError` where a blend would train on the rows of a file twice, or has too many shards.

    Two sources may share a file if they choose other rows of it (`where`), or make something else of them.

    Args:
        text: the raw files of each shard of each corpus.
        conversations: those of each source of conversations.
    """
    identity = functools.cache(_Identity(lock))  # a corpus is in the blends of several phases
    corpora: Sources = {c.name: (f"corpora[{i}]", c) for i, c in enumerate(config.corpora)}
    chats: Sources = {c.name: (f"chats[{i}]", c) for i, c in enumerate(config.chats)}
    problems = [
        problem
        for phase in config.pretrain.phases
        for problem in _shared((entry.corpus for entry in phase.blend), corpora, text, identity)
    ]
    problems += _shared((entry.source for entry in config.sft.blend), chats, conversations, identity)
    problems += _too_many(config, text)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def check_lengths(config: Config) -> None:
    """`ConfigError` where the settings of a job are longer than what Linux takes in one argument.

    They grow with the entries of a blend, and with the values of a source that `where` takes.
    """
    told: dict[str, Section] = {
        f"pretrain.phases[{i}].blend": phase_settings(config, phase.name)
        for i, phase in enumerate(config.pretrain.phases)
    }
    told["sft.blend"] = blend_settings(config)
    for i, corpus in enumerate(config.corpora):
        of_corpus = filter_settings if corpus.curation else tokenize_settings
        told[f"corpora[{i}]"] = of_corpus(config, corpus)
    told |= {f"chats[{i}]": render_settings(config, source) for i, source in enumerate(config.chats)}
    problems = [
        f"{at}: {size:,} bytes of settings for one command, where Linux takes {LONGEST_ARGUMENT:,}; "
        + (ONE_SOURCE if isinstance(settings, BlendSettings) else "choose by fewer values in `where`")
        for at, settings in told.items()
        if (size := len(settings.model_dump_json().encode())) > LONGEST_ARGUMENT
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_tokenizer(config: Config) -> None:
    """`ConfigError` where a tokenizer is to be taken from a directory that has none.

    One that was taken from there before, and is still here, needs the directory no more.
    """
    path = config.tokenizer.path
    if path is None or tokenizer_model(config) or any(Path(path).glob("tokenizer*")):
        return
    if any(Path(path).glob("vocab*")):  # of older models, which transformers converts
        return
    if (made := made_tokenizer(config)) and made.settings.get("path") == path:
        return
    if Path(path).is_dir():
        raise ConfigError(f"tokenizer.path: {path} holds no tokenizer, such as a tokenizer.json")
    raise ConfigError(f"tokenizer.path: {path!r} is no directory, and no OWNER/NAME of the Hugging Face hub")


def check_secrets(config: Config) -> None:
    """`ConfigError` where the file with secrets cannot be read, as a training would find when it begins."""
    try:
        credentials.read(config.cluster.secrets_file)
    except UserError as error:
        raise ConfigError(str(error)) from None


def made_tokenizer(config: Config) -> Record | None:
    """The record of the tokenizer of these data; None where it is not made yet."""
    try:
        return read(Path(config.pathvars["data"]) / "tokenizer/record.json")
    except (UserError, OSError):
        return None


def _too_many(config: Config, text: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[str]:
    """A problem for each phase that blends more shards than megatron-core can number.

    A shard of which rows are chosen may be left without tokens, and then does not count.
    """
    whole = {c.name for c in config.corpora if c.trained and not (c.where or c.curation or c.registered)}
    for i, phase in enumerate(config.pretrain.phases):
        number = sum(len(text[entry.corpus]) for entry in phase.blend if entry.corpus in whole)
        if number > MAX_SHARDS:
            yield (
                f"pretrain.phases[{i}].blend: {number:,} shards, where megatron-core takes {MAX_SHARDS:,}; "
                "set pretrain_data.shard_size, or a larger one, to put several raw files into one"
            )


class _Identity:
    """What tells two files apart: the content of one that lies elsewhere, the place of one that lies here."""

    def __init__(self, lock: Lock) -> None:
        self.lock = lock

    def __call__(self, source: str, path: str) -> object:
        if path.startswith("<data>/raw/"):
            return self.lock.file(source, path.rpartition("/")[2]).sha256 or (source, path)  # "": assumed
        try:
            found = Path(path).stat()
        except FileNotFoundError:  # a file of the sample
            return path
        return found.st_dev, found.st_ino


def _shared(
    names: Iterable[str],
    sources: Sources,
    files: Mapping[str, Mapping[str, Sequence[str]]],
    identity: Callable[[str, str], object],
) -> list[str]:
    """A problem for each pair of sources that read the same rows of a file, or one that reads it twice."""
    problems: dict[tuple[str, str], str] = {}
    seen: dict[tuple[object, str], tuple[str, str]] = {}
    for name in names:
        at, source = sources[name]
        reading = source.model_dump_json(exclude=_OTHER)
        for path in (path for shard in files[name].values() for path in shard):
            other_at, other = seen.setdefault((identity(name, path), reading), (at, path))
            if (other_at, other) == (at, path):
                continue
            if other_at == at:
                problem = f"{path} and {other} are one file; name it once"
            else:
                problem = f"reads {path}, which {other_at} reads too" + (f" as {other}" * (other != path))
                first, second = (s.split or "train" for s in (dict(sources.values())[other_at], source))
                twice = "train on it twice" if first == second else f"have it in {first} and in {second}"
                problem += (
                    f", so a blend of both would {twice}; take it out of one, or choose other rows "
                    "of it with `where`"
                )
            problems.setdefault((other_at, at), f"{at} ({name}): {problem}")
    return list(problems.values())
