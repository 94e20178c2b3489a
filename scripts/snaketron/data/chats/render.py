"""Render the conversations of a shard: the template makes the text, the tokenizer ids and a mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config.data import SPLITS
from snaketron.data.arrow import schema_with, text_of
from snaketron.data.chats import reasoning
from snaketron.data.chats.conversation import (
    Conversation,
    Span,
    check_text,
    control_tokens,
)
from snaketron.data.chats.environment import special_tokens
from snaketron.data.chats.marks import Rendered
from snaketron.data.chats.mask import Masker
from snaketron.data.chats.messages import Message
from snaketron.data.chats.notes import Notes
from snaketron.data.chats.probes import PROBE
from snaketron.data.chats.reading import optional_fields, read_conversation
from snaketron.data.chats.sequences import SCHEMA, Sequence, num_tokens, table
from snaketron.data.chats.template import Template, load_template
from snaketron.data.chats.unusable import ADVICE, LEFT_OUT, NO_END, Unusable
from snaketron.data.drops import FILTERED, TOO_DEEP, Bad, Drops, place, reject
from snaketron.data.encode import Mismatch, Unencodable
from snaketron.data.rows import read_rows
from snaketron.data.split import split_of
from snaketron.files import sha256
from snaketron.lineage.record import Opened, Record, making, of_user
from snaketron.log import UserError, logger
from snaketron.settings.chats import RenderSettings

import numpy as np
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
                day=settings.template_date,
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
        job.settings = made_with | settings.model_dump(mode="json")
        job.inputs = {
            "chats": renderer.read.entries(),
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
    read: Opened = field(default_factory=Opened)
    _checked: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    _added: set[int] = field(init=False)
    _ends: tuple[str, ...] = field(init=False)  # the added tokens as text
    notes: Notes = field(init=False)

    def __post_init__(self) -> None:
        added = self.masker.tokenizer.get_added_tokens_decoder()
        self.notes = Notes(self.settings, self.template, self.read)
        self._added = set(added)
        self._ends = tuple(token.content for token in added.values())

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
        schema = schema_with(SCHEMA, metadata, fields, "rendered chats")
        self.check_ends()
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
        self.notes.tell(drops, totals["conversations"])
        where = ", ".join(map(str, self.read))
        drops.check(self.settings, [reason for reason in drops.reasons if reason != FILTERED])
        if totals["conversations"] and (said := drops.told(where)):
            logger.info("%s", said)
        return {
            "rows": drops.num_rows,
            **totals,
            "splits": {split: dict(counts) for split, counts in kept.items()},
            "reasoning_modes": {mode: modes[mode] for mode in reasoning.MODES if modes[mode]},
            **self.notes.counts(),
            "dropped": {reason: count for reason, count in drops.reasons.most_common() if count},
            "dropped_rows": drops.listed,
            "replaced": drops.num_replaced,
            "encoder": self.masker.name,
        }

    def check_ends(self) -> None:
        """Raise `UserError` when no added token ends an answer: a model could not learn to stop there."""
        template = self.template
        if template.marked:
            template.check_marks()
        before, tools, arguments = next(template.probes())
        rendered = template.render([*before, PROBE[1]], tools, arguments)
        for start, end in rendered.spans[-1:]:
            encoding = self.masker.tokenizer.encode(rendered.text, add_special_tokens=False)
            trained = rendered.text[start:end]
            last = start + len(trained.rstrip())
            places = zip(encoding.ids, encoding.offsets, strict=True)
            if any(begin < last <= stop and number in self._added for number, (begin, stop) in places):
                continue
            if follows := rendered.text[end:].strip():
                raise UserError(
                    f"{template.name}: the generation block of an answer ends with {trained[-30:]!r}, and "
                    f"{follows[:30]!r} after it is not trained, so a model would not learn to stop; put the "
                    "token that ends the turn into the block"
                )
            raise UserError(
                f"{template.name}: an answer ends with {trained[-30:]!r}, and the tokenizer has no added "
                "token for that; use the template of this tokenizer, or add the token to it"
            )

    def render(self, chats: Iterable[Path], drops: Drops) -> Iterator[Texts]:
        """The rows of all files as text, one after the other."""
        settings = self.settings
        # Where thinking stays in the text, its tokens must be allowed there.
        allowed = () if settings.thinking_tags else ("<think>", "</think>")
        control = control_tokens(self.masker.tokenizer, allowed)
        optional = [*optional_fields(settings), *settings.metadata_fields]
        for path in chats:
            self.read.note(path)
            before = drops.num_rows
            rows = read_rows(
                path,
                required=[settings.messages_field],
                optional=optional,
                settings=settings,
                drops=drops,
                exact=True,
            )
            for number, row in rows:
                self.notes.fields.update(row.keys())
                try:
                    found = read_conversation(row, path, settings, drops)
                    self.notes.add(found)
                    check_text(found, control)
                    texts, whole = self.texts(found)
                except Unusable as error:
                    drops.add(path, number, error.reason, error.detail)
                except (Bad, RecursionError) as error:
                    bad = error if isinstance(error, Bad) else TOO_DEEP
                    reject(bad, path, number, settings, drops)
                else:
                    fractions = settings.valid_fraction, settings.test_fraction
                    split = settings.split or split_of(whole, *fractions)
                    metadata = [text_of(row.get(name)) for name in settings.metadata_fields]
                    yield Texts(path, number, texts, split, metadata)
            if drops.num_rows == before:
                name = settings.source
                raise UserError(
                    f"{path}: holds no conversations; remove it from the source {name!r} or fill it"
                )

    def texts(self, found: Conversation) -> tuple[list[Text], str]:
        """The sequences of a conversation, and the text that decides its split.

        That text is the conversation with all its reasoning. Messages after the last trained answer are left
        out: they train nothing, and would make the answer a part of the history, which templates shorten.
        """
        found = replace(found, messages=found.messages[: found.turns[-1][2]])
        if found.reasons and not self.template.writes_reasoning:
            if reasoning.only_reasons(found):
                raise Unusable(LEFT_OUT, "an answer that is only reasoning")
            found = reasoning.without(found)
            self.notes.num_unwritten += 1
        mode = reasoning.choose(self.settings, found)
        used = reasoning.without(found) if mode == reasoning.STRIPPED else found
        if self.settings.sequences == "turn" and used.reasons:
            parts = used.turns
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
        kind = _kind(found, messages, mode)
        self._checked[kind] += 1
        if self._checked[kind] <= CHECKED:
            self.template.check(messages, found.tools, arguments, rendered)
        spans = rendered.spans
        self._check_end(rendered)
        if turn or found.untrained:
            if None in rendered.owners:
                what = "`sequences: turn`" if turn else "an answer of weight 0"
                raise UserError(
                    f"{self.template.name}: {what} needs a template that loops over `messages` "
                    "outside of macros, to know whose each generation block is; set sequences to "
                    "conversation, or change the template"
                )
            owned = zip(spans, rendered.owners, strict=True)
            spans = [span for span, n in owned if n is not None and n >= first and n not in found.untrained]
        trained = [n for n in rendered.unwritten if n >= first and n not in found.untrained]
        self.notes.noted["reasoning_left_out"] += len(trained)
        return Text(rendered.text, spans, turn, mode)

    def _check_end(self, rendered: Rendered) -> None:
        """Raise `Unusable` where an answer does not end with an added token; one may have several spans."""
        owners = rendered.owners
        for (start, end), owner, following in zip(rendered.spans, owners, [*owners, -1][1:], strict=True):
            written = rendered.text[start:end].rstrip()
            if (owner is None or owner != following) and not written.endswith(self._ends):
                raise Unusable(NO_END, "" if owner is None else f"message {owner}: {written[-30:]!r}")

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
                else:
                    yield made

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
