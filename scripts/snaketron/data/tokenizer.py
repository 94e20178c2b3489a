"""The tokenizer of a run: trained from text or taken from a directory, always the same two files.

Its identity is the sha256 of tokenizer.json. Using it imports `tokenizers`, and not transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config.checks import check_vocab_size
from snaketron.config.data import SPECIAL_TOKENS
from snaketron.data.drops import Drops
from snaketron.data.rows import read_texts
from snaketron.huggingface.config import token_ids
from snaketron.lineage.record import Record, making, read
from snaketron.log import UserError, first_line, logger
from snaketron.settings.text import ReadSettings
from snaketron.settings.tokenizer import TokenizerSettings
from snaketron.sources.formats import FETCH, IS_POINTER, is_pointer
from snaketron.sources.pairs import dtype_of

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT, PAD = SPECIAL_TOKENS[:2]
# Splits text as Nemotron's own tokenizers do: into words with the space before them, the words in camelCase,
# single digits (so that a number has one spelling), punctuation, line ends and spaces. For exactly this
# pattern fastokens has a scanner, which is six times as fast as its regular expressions
# (tests/benchmarks/tokenization.py).
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Info:
    """What the data stages need to know of a tokenizer."""

    sha256: str
    vocab_size: int  # largest id + 1
    eos_token: str
    eos_id: int
    pad_id: int  # `eos_id` for a tokenizer without a padding token

    @property
    def dtype(self) -> str:
        """Type of token ids on disk: uint16 holds ids up to 65535."""
        return dtype_of(self.vocab_size)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory; it neither truncates nor pads, whatever its file says."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; build the tokenizer first (rule build_tokenizer)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """What the tokenizer.json of a directory says."""
    made: dict[str, Any] = _read_json(directory / "tokenizer.json")
    return made


def _read_json(path: Path) -> Any:
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; build the tokenizer first (rule build_tokenizer)") from None
    except ValueError as error:
        raise UserError(f"{path}: not a tokenizer ({error})") from None


def tokenizer_info(directory: Path, made: Mapping[str, Any] | None = None) -> Info:
    """Vocabulary size, special ids and identity of the tokenizer in a directory.

    They are read from its files: making a tokenizer of 131,072 tokens takes seven times as long. `made` is
    what `read_tokenizer` returned, where it has been called.
    """
    path = directory / "tokenizer.json"
    ids = token_ids(path, made or read_tokenizer(directory))
    config = _read_config(directory / "tokenizer_config.json")
    eos_token, pad_token = _content(config.get("eos_token")), _content(config.get("pad_token"))
    eos_id = ids.get(eos_token) if eos_token else None
    if eos_token is None or eos_id is None:
        raise UserError(f"{directory}: no end-of-document token; set eos_token in tokenizer_config.json")
    pad_id = ids.get(pad_token) if pad_token else None
    return Info(
        sha256=files.sha256(path),
        vocab_size=max(ids.values()) + 1,
        eos_token=eos_token,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
    )


def known_hashes(directory: Path) -> list[str]:
    """The hash of tokenizer.json, and that of the file which it was made of where `tokenizer.path` named one.

    Building writes the same tokenizer in other bytes. What was made elsewhere knows the hash of the original.
    """
    hashes, record = [files.sha256(directory / "tokenizer.json")], directory / "record.json"
    if record.exists():
        origins = read(record).inputs_named("origin")
        hashes += [entry.sha256 for entry in origins if entry.file.name == "tokenizer.json" and entry.sha256]
    return hashes


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    return config if isinstance(config, dict) else {}


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json is a string or {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


# ------------------------------------------------------------------------------------------- building


def build(
    text: Sequence[Path],
    *,
    settings: TokenizerSettings,
    output: Path,
    record: Path,
    reading: ReadSettings | None = None,
) -> Record:
    """Write tokenizer.json (`output`), tokenizer_config.json beside it, and `record`; returns the record.

    `reading` says what becomes of bad rows in the files of `text`.
    """
    reading, drops = reading or ReadSettings(), Drops()
    outputs = {name: output.with_name(name) for name in (output.name, "tokenizer_config.json")}
    with making("tokenizer", output.parent.name, outputs=outputs, record=record) as job:
        if settings.path is not None:
            tokenizer, config, origin = convert(settings.path)
            job.inputs, job.settings = {"origin": origin}, {"path": settings.path}
        else:
            vocab_size, text_field = settings.vocab_size, settings.text_field
            assert vocab_size is not None and text_field is not None
            documents = (t for file in text for _, t in read_texts(file, text_field, reading, drops))
            tokenizer, config = train(documents, vocab_size), trained_config()
            drops.check(reading)
            if said := drops.told("tokenizer.text"):
                logger.warning("%s", said)
            job.inputs = {"text": text}
            job.settings = {"vocab_size": vocab_size, "text_field": text_field, "pattern": PATTERN}
        job.counts = {"vocab_size": max(tokenizer.get_vocab().values()) + 1}
        if drops.reasons or drops.num_replaced:
            job.counts |= {
                "rows": drops.num_rows,
                "dropped": dict(drops.reasons),
                "dropped_rows": drops.listed,
            }
            job.counts["replaced"] = drops.num_replaced
        job.aside[output.name].write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        job.aside["tokenizer_config.json"].write_bytes(files.to_json(config))
    return job.record


def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens; only the documents and their order matter."""
    if problems := check_vocab_size(vocab_size):
        raise UserError("\n".join(problems))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found = iter(documents)
    if (first := next(found, None)) is None:
        raise UserError("tokenizer.text holds no documents to train a tokenizer on")
    tokenizer.train_from_iterator(chain([first], found), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        logger.warning("the text has pairs for only %d of %d tokens", size, vocab_size)
    return tokenizer


def trained_config() -> dict[str, Any]:
    """tokenizer_config.json of a trained tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }


def convert(path: str) -> tuple[Tokenizer, dict[str, Any], list[Path]]:
    """A Hugging Face tokenizer, its configuration and what it was made from."""
    tokenizer = from_hugging_face(path)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer.path {path}: {type(tokenizer).__name__} has no fast version (tokenizer.json)"
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"tokenizer.path {path}: no eos_token; set it in a local copy's tokenizer_config.json"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = Path(folder)
        config = _read_config(saved / "tokenizer_config.json")
        backend = load_tokenizer(saved)
    # Left out: how it was loaded, code of its repository, and the template (rule install_chat_template).
    for key in ("auto_map", "backend", "chat_template", "is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows, too
    if config.get("pad_token") is None:
        config["pad_token"] = config["eos_token"]
    return backend, config, origin(path)


def origin(path: str) -> list[Path]:
    """The files of a tokenizer's directory that its ids come from, for the record.

    The record beside each downloaded file says where on the hub it was, with the commit.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    return [file for name in names if (file := Path(path) / name).is_file()]


def from_hugging_face(path: str) -> Any:
    """The `transformers` tokenizer of a directory; rule download_model has fetched one of the hub."""
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UserError(
            f"tokenizer.path {path}: no such directory (a tokenizer of the hub is named as OWNER/NAME or "
            "OWNER/NAME@REVISION)"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers does not check what it reads, and fails in many ways
        pointer = is_pointer(Path(path) / "tokenizer.json")
        why = f"tokenizer.json is {IS_POINTER}; {FETCH}" if pointer else first_line(error)
        raise UserError(f"tokenizer.path {path}: no tokenizer in this directory ({why})") from None
