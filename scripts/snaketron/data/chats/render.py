"""Render the conversations of a shard: the template makes the text, the tokenizer ids and a mask."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.data.arrow import KEY, text_of
from snaketron.data.chats import reasoning
from snaketron.data.chats.conversation import (
    ADVICE,
    LEFT_OUT,
    NO_END,
    Conversation,
    Message,
    Span,
    Unusable,
    check_text,
    control_tokens,
    conversation,
)
from snaketron.data.chats.mask import Masker
from snaketron.data.chats.sequences import SCHEMA, Sequence, num_tokens, table
from snaketron.data.chats.template import PROBE, Template, load_template, special_tokens
from snaketron.data.drops import FILTERED, Bad, Drops, place, reject
from snaketron.data.encode import Mismatch, Unencodable
from snaketron.data.rows import read_rows
from snaketron.data.split import SPLITS, split_of
from snaketron.files import sha256
from snaketron.lineage.record import Record, making, of_user
from snaketron.log import UserError, logger
from snaketron.settings.chats import RenderSettings
from snaketron.wording import counted

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_CHARACTERS = 1_000_000  # tokenized together
ROW_GROUP_TOKENS = 1 << 18
CHECKED = 4  # sequences of each kind that are compared with what inference is given


def render_chats(
    chats: list[Path],
    *,
    settings: RenderSettings,
    tokenizer: Path,
    template: Path,
    output: Path,
    record: Path,
) -> Record:
    """Render the files of a shard to `output`, then write `record` and return it."""
    name = f"{settings.source}/{output.stem}"
    with making("render_chat", name, outputs={output.name: output}, record=record) as job:
        renderer = Renderer(
            template=load_template(
                template,
                variables=special_tokens(tokenizer),
                arguments=settings.template_arguments,
                off_arguments=settings.reasoning.off_arguments,
            ),
            masker=Masker(tokenizer),
            settings=settings,
        )
        made_with = {
            "source": settings.source,
            "tokenizer_sha256": sha256(tokenizer / "tokenizer.json"),
            "template_sha256": sha256(template),
        }
        job.counts = renderer.write(job.aside[output.name], chats, made_with)
        job.settings = made_with | settings.model_dump()
        job.inputs = {
            "chats": map(of_user, renderer.read),
            "tokenizer": tokenizer / "tokenizer.json",
            "template": of_user(template),
        }
    return job.record


class Text(NamedTuple):
    """A sequence before it is tokenized."""

    text: str
    spans: list[Span]
    turn: int
    mode: str


class Texts(NamedTuple):
    """A conversation before it is tokenized."""

    file: Path
    row: int
    texts: list[Text]
    split: str
    metadata: list[str | None]

    @property
    def size(self) -> int:
        return sum(len(text.text) for text in self.texts)


@dataclass
class Renderer:
    """Turns the rows of one source into token ids."""

    template: Template
    masker: Masker
    settings: RenderSettings
    read: list[Path] = field(default_factory=list)  # the files that were opened
    found: set[str] = field(default_factory=set)  # the metadata fields that a row had
    _checked: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    _added: list[int] = field(init=False)
    _num_unwritten: int = 0  # conversations whose reasoning the template leaves out

    def __post_init__(self) -> None:
        self._added = list(self.masker.tokenizer.get_added_tokens_decoder())

    def write(self, path: Path, chats: list[Path], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Write the conversations of the files `chats` to `path`; returns the counts for the record."""
        try:
            return self._write(path, chats, metadata)
        except Mismatch as error:
            logger.warning("fastokens: %s; rendering again, with `tokenizers`", error)
            masker = Masker(self.masker.directory, problem=str(error))
            again = Renderer(self.template, masker, self.settings)
            counts = again._write(path, chats, metadata)
            self.read = again.read
            return counts

    def _write(self, path: Path, chats: list[Path], metadata: Mapping[str, Any]) -> dict[str, Any]:
        fields = self.settings.metadata_fields
        if taken := [name for name in fields if name in SCHEMA.names]:
            raise UserError(
                f"metadata_fields: {taken[0]!r} is a column of rendered chats itself; leave it out of "
                "metadata_fields, or rename it in the raw files"
            )
        if not self.template.marked:
            self.check_ends()
        schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in fields)])
        schema = schema.with_metadata({KEY: json.dumps(metadata).encode()})
        texts = [name for name in schema.names if name not in ("input_ids", "loss_mask", "row", "turn")]
        options = {"compression": "zstd", "use_dictionary": texts, "write_statistics": False}
        drops = Drops(advice=ADVICE)
        names = ("conversations", "sequences", "tokens", "trained_tokens")
        kept = {split: Counter(dict.fromkeys(names, 0)) for split in SPLITS}
        modes: Counter[str] = Counter()
        with pq.ParquetWriter(path, schema, **options) as writer:
            conversations = self.limited(self.encode(self.render(chats, drops), drops), drops)
            for group in batches(conversations, ROW_GROUP_TOKENS, num_tokens):
                writer.write_table(table([item for items in group for item in items], schema))
                for items in group:
                    count = kept[items[0].split]
                    count["conversations"] += 1
                    count["sequences"] += len(items)
                    count["tokens"] += num_tokens(items)
                    count["trained_tokens"] += sum(int(np.count_nonzero(item.loss_mask)) for item in items)
                    modes.update(item.mode for item in items)
        totals = {name: sum(counts[name] for counts in kept.values()) for name in names}
        self.complain(drops, totals["conversations"])
        drops.check(self.settings, [reason for reason in drops.reasons if reason != FILTERED])
        return {
            "rows": drops.num_rows,
            **totals,
            "splits": {split: dict(counts) for split, counts in kept.items()},
            "reasoning_modes": {mode: modes[mode] for mode in reasoning.MODES if modes[mode]},
            "reasoning_not_written": self._num_unwritten,
            "dropped": {reason: count for reason, count in drops.reasons.most_common() if count},
            "dropped_rows": drops.listed,
            "replaced": drops.num_replaced,
            "encoder": self.masker.name,
        }

    def check_ends(self) -> None:
        """Raise `UserError` when no added token ends an answer: a model could not learn to stop there."""
        rendered = self.template.render(PROBE)
        for start, end in rendered.spans:
            encoding = self.masker.tokenizer.encode(rendered.text, add_special_tokens=False)
            places = zip(encoding.ids, encoding.offsets, strict=True)
            if not any(stop == end and number in self._added for number, (_, stop) in places):
                raise UserError(
                    f"{self.template.name}: an answer ends with {rendered.text[start:end][-30:]!r}, and the "
                    "tokenizer has no added token for that; use the template of this tokenizer, or add the "
                    "token to it"
                )

    def complain(self, drops: Drops, num_kept: int) -> None:
        """`UserError` when no row can be used; a warning when no row is wanted."""
        names = ", ".join(map(str, self.read))
        if not num_kept and drops.num_rows:
            message = f"{names}: none of {drops.num_rows} rows can be used: {explain(drops)}"
            if drops.num_rows > drops.reasons[FILTERED]:
                raise UserError(message)
            logger.warning("%s", message)
        for name in self.settings.metadata_fields:
            if num_kept and name not in self.found:
                logger.warning("%s: no row has the metadata field %r", names, name)
        if self._num_unwritten:
            logger.warning(
                "%s: the template writes no reasoning; %d conversations are trained without theirs",
                self.template.name,
                self._num_unwritten,
            )

    def render(self, chats: Iterable[Path], drops: Drops) -> Iterator[Texts]:
        """The rows of all files as text, one after the other."""
        settings = self.settings
        control = control_tokens(self.masker.tokenizer)
        optional = [settings.tools_field, *settings.metadata_fields]
        for path in chats:
            self.read.append(path)
            required = [settings.messages_field]
            rows = read_rows(path, required=required, optional=optional, settings=settings, drops=drops)
            for number, row in rows:
                self.found.update(name for name in settings.metadata_fields if name in row)
                try:
                    check_field(row, settings.messages_field)
                    found = conversation(row[settings.messages_field], row.get(settings.tools_field))
                    check_text(found, control)
                    texts, whole = self.texts(found)
                except Unusable as error:
                    drops.add(path, number, error.reason, error.detail)
                except Bad as bad:
                    reject(bad, path, number, settings, drops)
                else:
                    split = split_of(whole, settings.valid_fraction, settings.test_fraction)
                    metadata = [text_of(row.get(name)) for name in settings.metadata_fields]
                    yield Texts(path, number, texts, split, metadata)

    def texts(self, found: Conversation) -> tuple[list[Text], str]:
        """The sequences of a conversation, and the text that decides its split.

        That text is the conversation with all its reasoning. Messages after the last answer are left out:
        they train nothing, and would make the answer a part of the history, which templates shorten.
        """
        found = Conversation(found.messages[: found.turns[-1][1]], found.tools)
        if found.reasons and not self.template.writes_reasoning:
            if reasoning.only_reasons(found):
                raise Unusable(LEFT_OUT, "an answer that is only reasoning")
            found = reasoning.without(found)
            self._num_unwritten += 1
        mode = reasoning.choose(self.settings, found)
        used = reasoning.without(found) if mode == reasoning.STRIPPED else found
        if self.settings.sequences == "turn" and used.reasons:
            parts = [(turn, *bounds) for turn, bounds in enumerate(used.turns, 1)]
        else:
            parts = [(0, 0, len(used.messages))]
        made = [self._text(used, mode, *part) for part in parts]
        if mode in (reasoning.NONE, reasoning.FULL):
            return made, made[-1].text
        return made, self.template.render(found.messages, found.tools).text

    def _text(self, found: Conversation, mode: str, turn: int, first: int, end: int) -> Text:
        """One sequence of messages[:end]; the answers from message `first` on are trained."""
        modes, messages, arguments = self.settings.reasoning, found.messages[:end], {}
        if mode in (reasoning.NONE, reasoning.STRIPPED):
            arguments = modes.off_arguments
        elif mode == reasoning.LOW_EFFORT:
            arguments = modes.low_effort_arguments
        elif mode == reasoning.TRUNCATED:
            position = reasoning.draw(self.settings, found, f"budget {turn}")
            cut = reasoning.cut(self.masker.tokenizer, messages, first, modes.min_budget, position)
            if cut is None:
                mode = reasoning.FULL
            else:
                messages = cut.messages
                arguments = {modes.budget_argument: cut.budget} if modes.budget_argument else {}
        rendered = self.template.render(messages, found.tools, arguments)
        if not self.template.marked:
            kind = _kind(found, messages, mode)
            self._checked[kind] += 1
            if self._checked[kind] <= CHECKED:
                self.template.check(messages, found.tools, arguments, rendered)
        spans = rendered.spans
        if turn:
            if None in rendered.owners:
                raise UserError(
                    f"{self.template.name}: `sequences: turn` needs a template that loops over `messages` "
                    "outside of macros, to know whose each generation block is; set sequences to conversation"
                )
            owned = zip(spans, rendered.owners, strict=True)
            spans = [span for span, owner in owned if owner is not None and owner >= first]
        return Text(rendered.text, spans, turn, mode)

    def encode(self, rendered: Iterable[Texts], drops: Drops) -> Iterator[list[Sequence]]:
        """Encode conversations, and drop those with nothing to train on; with a limit, none is read ahead."""
        settings = self.settings
        limited = settings.max_documents is not None or settings.max_tokens is not None
        at_once = 1 if limited else BATCH_CHARACTERS
        for batch in batches(rendered, at_once, lambda item: item.size):
            texts = [text for source in batch for text in source.texts]
            try:
                encoded = iter(self.masker.encode([t.text for t in texts], [t.spans for t in texts]))
            except Unencodable as error:
                source = next(s for s in batch if any(t is texts[error.index] for t in s.texts))
                raise UserError(f"{place(source.file, source.row)}: {error}; remove the row") from None
            for source in batch:
                made = []
                for text in source.texts:
                    input_ids, loss_mask = next(encoded)
                    item = Sequence(
                        input_ids,
                        loss_mask,
                        file=str(source.file),
                        row=source.row,
                        turn=text.turn,
                        split=source.split,
                        mode=text.mode,
                        metadata=source.metadata,
                    )
                    made.append(item)
                if not all(item.loss_mask.any() for item in made):
                    drops.add(source.file, source.row, "nothing to train on")
                elif not (self.template.marked or all(self.ends(item) for item in made)):
                    drops.add(source.file, source.row, NO_END)
                else:
                    yield made

    def ends(self, item: Sequence) -> bool:
        """Whether each answer ends with an added token, and not with a token of its text."""
        last = item.loss_mask > np.append(item.loss_mask[1:], 0)
        return bool(np.isin(item.input_ids[last], self._added).all())

    def limited(self, conversations: Iterable[list[Sequence]], drops: Drops) -> Iterator[list[Sequence]]:
        """The first conversations, exactly as many as the limits of the settings allow."""
        settings, tokens = self.settings, 0
        for count, items in enumerate(conversations, 1):
            tokens += num_tokens(items)
            if settings.max_tokens is not None and tokens > settings.max_tokens:
                drops.num_rows -= 1  # this one lies beyond the limit
                if count == 1:
                    raise UserError(
                        f"{place(Path(items[0].file), items[0].row)}: the first conversation "
                        f"has {tokens} tokens, more than max_tokens {settings.max_tokens} of source "
                        f"{settings.source!r}; raise it"
                    )
                return
            yield items
            if count == settings.max_documents:
                return


def _kind(found: Conversation, messages: list[Message], mode: str) -> tuple[Any, ...]:
    """All that matters to a template: who speaks after whom, and where there is reasoning or a call."""
    steps = {
        (before["role"], message["role"], "reasoning_content" in message, "tool_calls" in message)
        for before, message in pairwise(messages)
    }
    return (mode, bool(found.tools), messages[0]["role"], frozenset(steps))


def check_field(row: Mapping[str, Any], messages_field: str) -> None:
    """Raise `Bad` when the field holds no messages; then `messages_field` is mostly wrong."""
    messages = row[messages_field]
    if messages is None or isinstance(messages, list):
        return
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        return  # JSON text
    fields = ", ".join(repr(name) for name in row)
    raise Bad(
        f"field {messages_field!r} holds a {type(messages).__name__}, not a list of messages; "
        f"the fields are {fields}",
        "set messages_field of this source to the right one",
    )


def batches[Item](items: Iterable[Item], most: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in their order, in lists; a list ends when its sizes add up to `most` or more."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def explain(drops: Drops) -> str:
    """Reasons and numbers in one line, with an example of the first."""
    reasons = counted(dict(drops.reasons.most_common()), empty="")
    if not drops.listed:
        return reasons
    first = drops.listed[0]
    return f"{reasons}; {place(Path(first['file']), first['row'])}: {first['detail'] or first['reason']}"
