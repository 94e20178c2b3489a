"""Sources of text and conversations, and what becomes of them before a training."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, ClassVar, Literal

from snaketron.config.base import Fraction, Mixed, Name, Positive, Section, Sha256, Share, Text, key
from snaketron.config.curation import Curation

from pydantic import Field


class Hub(Section):
    """A data set of the Hugging Face hub. The lock file pins its commit and files."""

    repository: Text = Field(description="owner/name of the data set")
    configuration: Text | None = key(
        None, "its configuration, by its exact name; null: the only one, or the default one"
    )
    split: Text = key("train", "its split, by its exact name")
    revision: Text = key("main", "branch, tag or commit that lock_sources pins")


Split = Literal["train", "valid", "test"]
SPLITS = ("train", "valid", "test")


class Registered(Section):
    """Data that was made elsewhere, by split. It is verified and recorded, and not made again."""

    train: list[Text] = Field(
        min_length=1,
        description="to train on, by path or glob: PREFIX of each pair PREFIX.bin and PREFIX.idx of tokens, "
        "or Parquet files of packs",
    )
    valid: list[Text] = key(list, "held out for validation; []: none, so it has no validation loss")
    test: list[Text] = key(list, "held out for the test; []: none")
    tokenizer_sha256: Sha256 | None = key(
        None,
        "sha256 of the tokenizer.json that it was made with, which that of this workflow must have; null: "
        "what packs say themselves, else only their ids are compared with the vocabulary",
    )


class Source(Section):
    """Rows from files: of this machine, or of elsewhere and then listed in the lock file."""

    section: ClassVar[Literal["pretrain_data", "sft_data"]]  # says what becomes of the rows
    made: ClassVar[Literal["tokens", "packs"]]  # the key of what was made of it elsewhere

    name: Name = Field(description="directory name of what is made from it")
    paths: list[Text] = key(
        list,
        "files, directories or globs: .jsonl, .ndjson or .json (also .gz, .zst, .bz2, .xz), .parquet, "
        ".arrow; or addresses (s3://, gs://, hf://, https://), which scripts/lock_sources.py lists",
    )
    hub: Hub | None = key(None, "a data set of the Hugging Face hub, in place of `paths`")
    where: dict[str, list[str | int | bool]] = key(
        dict, "keep only rows whose field is, or is a list that holds, one of these values"
    )
    split: Split | None = key(
        None,
        "train, valid or test: what all of its documents or conversations are for; null: a hash of each "
        "decides, by `valid_fraction` and `test_fraction`",
    )
    max_files: Positive | None = key(
        None, "use only so many files, the first ones; the others are not even downloaded; null: all"
    )
    max_documents: Positive | None = key(
        None, "take so many documents of the first files and no more, to try things out; null: all"
    )
    max_tokens: Positive | None = key(
        None, "take whole documents of the first files up to so many tokens; null: all"
    )
    metadata_fields: list[Text] = key(list, "columns or JSON keys to keep beside the tokens")

    @property
    def limited(self) -> bool:
        """Whether only the beginning of the source is used."""
        return self.max_documents is not None or self.max_tokens is not None

    @property
    def trained(self) -> bool:
        """Whether it is trained on; else all of it is held out."""
        return self.split in (None, "train")

    @property
    def registered(self) -> Registered | None:
        """What was made of it elsewhere; None where it is made here."""
        found: Registered | None = getattr(self, self.made)
        return found


class Corpus(Source):
    """One pretraining corpus: raw files of one kind, tokenized once and shared by every phase."""

    section, made = "pretrain_data", "tokens"

    tokens: Registered | None = key(
        None, "pairs of .bin and .idx that Megatron's tools have made elsewhere, in place of `paths`"
    )
    text_field: Text = key(
        "text", "column or JSON key that holds the document; `a.b`: the field b of the object a"
    )
    curation: Curation | None = key(None, "what is removed before it is tokenized; null: nothing")


Tags = Annotated[list[Text], Field(min_length=2, max_length=2)]


class Reasoning(Section):
    """What becomes of reasoning, for shares of the conversations that have some; the others stay as they are.

    Which ones is decided by a hash of the seed and the conversation.
    """

    stripped: Share = key(
        0.0, "share whose reasoning is taken out, to train answers without (0.03: Nemotron)"
    )
    low_effort: Share = key(
        0.0,
        "share that is marked as of low effort by `low_effort_arguments`; 1 for a source of short reasoning",
    )
    truncated: Share = key(
        0.0, "share whose reasoning is cut to a random number of tokens, a budget (0.12: Nemotron)"
    )
    min_budget: Positive = key(32, "tokens: the smallest budget; shorter reasoning is not cut")
    off_arguments: dict[str, Any] = key(
        lambda: {"enable_thinking": False},
        "template arguments of conversations without reasoning: those that never had any, and those stripped",
    )
    low_effort_arguments: dict[str, Any] = key(
        lambda: {"low_effort": True}, "template arguments of conversations of low effort"
    )
    budget_argument: str | None = key(
        "reasoning_budget", "template argument that gets the budget of a cut one; null: none"
    )


class ChatSource(Source):
    """One source of conversations in the OpenAI message format."""

    section, made = "sft_data", "packs"

    packs: Registered | None = key(
        None, "packed Parquet files as Megatron-Bridge reads them, made elsewhere, in place of `paths`"
    )
    messages_field: Text = key("messages", "column or JSON key that holds the list of messages")
    tools_field: str = key(
        "tools", "column or JSON key that holds the tool definitions; may be absent in a row"
    )
    system_field: str | None = key(
        "system",
        "column or JSON key that holds the text of a system message; may be absent in a row; null: not read",
    )
    role_key: Text = key("role", "key of a message that says who speaks; from: ShareGPT")
    content_key: Text = key("content", "key of a message that holds its text; value: ShareGPT")
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] = key(
        dict, "roles of other names: {human: user, gpt: assistant} and the like"
    )
    thinking_tags: Tags | None = key(
        lambda: ["<think>", "</think>"],
        "what lies between these tags at the beginning of an answer's text is taken for its reasoning, and "
        "counted; null: it stays text",
    )
    chat_template: Text | None = key(
        None, "Jinja file that renders this source; null: the one of `tokenizer`, which inference uses"
    )
    template_arguments: dict[str, Any] = key(
        dict, "arguments of the template for this source, over `sft_data.template_arguments`"
    )
    sequences: Literal["conversation", "turn"] = key(
        "conversation",
        "what one sequence is: a whole conversation, each answer trained; or, of a conversation with "
        "reasoning, what inference sees up to the answers to one turn of the user, only these trained",
    )
    reasoning: Reasoning | None = key(None, "reasoning modes of this source; null: `sft_data.reasoning`")


class CorpusWeight(Section):
    corpus: Text = Field(description="name of a corpus")
    weight: Mixed = Field(description="share of the mix, relative to the other weights")


class SourceWeight(Section):
    source: Text = Field(description="name of a chat source")
    weight: Mixed = Field(description="share of the mix, relative to the other weights")


def sample_paths(name: str, count: int) -> list[str]:
    return [f"data/sample/{name}/part_{i}.jsonl" for i in range(count)]


def sample_corpora() -> list[Corpus]:
    names = ("docs", "code", "packages", "requests")
    return [Corpus(name=name, paths=sample_paths(name, 3)) for name in names]


def sample_chats() -> list[ChatSource]:
    return [ChatSource(name=name, paths=sample_paths(name, 2)) for name in ("questions", "tools")]


CALL = "<tool_call>"  # what an answer has where it calls a function
# Tokens of every trained tokenizer beside the 256 bytes.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    CALL,
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
)


class Tokenizer(Section):
    path: Text | None = key(
        None,
        "Hugging Face tokenizer to use: a directory, or OWNER/NAME or OWNER/NAME@REVISION of the hub, whose "
        "files scripts/lock_sources.py lists; null trains one from `text`",
    )
    chat_template: Text | None = key(
        "config/chat_template.jinja",
        "Jinja file saved with the tokenizer; null keeps the template that comes with `path`",
    )
    vocab_size: Positive = key(
        2048,
        "tokens of a trained tokenizer, special ones included; 32k to 131k for a real model. With `path` the "
        "number of its tokens, by which the dry-run estimates",
    )
    text: list[Text] = key(
        lambda: [*sample_paths("docs", 1), *sample_paths("requests", 3)],
        "files that a new tokenizer is trained on (no globs: a file that joins a corpus later must not "
        "change the tokenizer); edit it, or run with `-R build_tokenizer`, to ask for a new one",
    )
    text_field: Text = key("text", "column or JSON key of those files that holds the document")


class Rows(Section):
    """How raw files become jobs, how many rows are used, and what becomes of those that cannot be used."""

    shard_size: Positive | None = key(
        None,
        "bytes: raw files of a source are put together, by name, until a shard has so many, and each shard "
        "is one job; null: each file is a shard. A job costs up to two seconds beside its work, so "
        "1_000_000_000 is a good size for many small files",
    )
    max_files: Positive | None = key(
        None, "`max_files` of each source that has none itself, to try a whole configuration out; null: all"
    )
    max_documents: Positive | None = key(
        None, "`max_documents` of each source that has none itself, likewise; null: all"
    )
    bad_rows: Literal["fail", "drop"] = key(
        "fail",
        "a row that cannot be read (invalid JSON, no text, a line that is too long): stop, or drop it and "
        "count it",
    )
    invalid_text: Literal["fail", "replace", "drop"] = key(
        "fail",
        "text that is not valid Unicode (lone surrogates, invalid UTF-8): stop, put U+FFFD in place of what "
        "is invalid, or drop and count the row. NUL is valid and stays",
    )
    max_line_bytes: Positive = key(
        50_000_000, "bytes of a row above which it is a bad row; a job takes up to 20 times as much memory"
    )
    max_dropped_fraction: Fraction = key(
        0.01, "share of bad or invalid rows of a shard above which it fails instead of dropping them"
    )


class PretrainData(Rows):
    valid_fraction: Fraction = key(
        0.01, "share of the documents held out for validation, by a hash of the text"
    )
    test_fraction: Fraction = key(0.01, "share of the documents held out for the test, by a hash of the text")
    document_order: Literal["kept", "shuffled"] = key(
        "kept", "order of the documents of a shard: as in the raw files, or shuffled by the seed"
    )
    max_document_tokens: Annotated[int, Field(ge=2)] | None = key(
        None, "tokens of a document, its end included, above which it is `long`; null: any length"
    )
    long_documents: Literal["cut", "drop"] = key(
        "cut", "cut a long document into several ones of at most so many tokens, or drop and count it"
    )
    max_epochs: Annotated[float, Field(gt=0)] = key(
        4.0, "warn when a phase repeats a corpus more often (above about 4, repeated tokens are worth less)"
    )
    cpus_per_task: Positive = key(1, "CPU threads of a job that tokenizes; the result is the same")


Packing = Literal["first_fit_decreasing", "first_fit_shuffle", "concatenative"]
LongConversations = Literal["drop", "cut_at_answer", "cut_unfinished"]


class SftData(Rows):
    max_dropped_fraction: Fraction = key(
        0.01,
        "share of a shard above which it fails: of rows that are bad, invalid or cannot be rendered, and of "
        "conversations that no pack takes, since they are too long or nothing of them is trained",
    )
    valid_fraction: Fraction = key(
        0.04, "share of the conversations held out for validation, by a hash of the text"
    )
    test_fraction: Fraction = key(
        0.02, "share of the conversations held out for the test, by a hash of the text"
    )
    template_arguments: dict[str, Any] = key(
        dict,
        "arguments of the chat templates of all sources, as inference will give them: "
        "{enable_thinking: true, truncate_history_thinking: false} and the like",
    )
    template_date: date = key(
        date(2026, 1, 1),
        "the date that templates are told which ask for today's: another day must not give other tokens",
    )
    reasoning: Reasoning = key(Reasoning, "reasoning modes: without, of low effort, cut to a budget")
    pack_size: Positive = key(
        1024, "tokens of a pack, and the sequence length of SFT; see long_conversations"
    )
    padding_multiple: Positive | None = key(
        None,
        "packs leave room to pad each conversation to a multiple of this; null: what the context parallel "
        "size of the trainings on them needs (twice the size). Another one packs anew",
    )
    long_conversations: LongConversations = key(
        "drop",
        "what becomes of a conversation of more tokens than a pack: dropped; cut after the last answer that "
        "ends within the pack; or cut at the size of the pack, and that answer not trained. Each is "
        "counted",
    )
    algorithm: Packing = key(
        "first_fit_decreasing",
        "how conversations are packed: tightly, longest first; first fit in an order shuffled by the seed; "
        "or in order and only as far as the next one fits",
    )
    pack_across_shards: bool = key(
        False, "pack all shards of a source in one job, for fuller packs when a shard fills only a few"
    )
