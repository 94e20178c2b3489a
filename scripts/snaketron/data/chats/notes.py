"""What the rendering of a shard counts and tells: nothing that may carry meaning passes in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from snaketron.data.chats.conversation import Conversation
from snaketron.data.chats.template import Template
from snaketron.data.drops import FILTERED, Drops
from snaketron.lineage.record import Opened
from snaketron.log import UserError, logger
from snaketron.settings.chats import RenderSettings

# What is counted and told, by its name in the record.
NOTES = {
    "thinking_in_content": "{count} answers have their thinking in the content; it is taken for reasoning "
    "(thinking_tags)",
    "null_arguments": "{count} calls have arguments that are null, and are trained with them; leave them out "
    "of the file where a program filled them in, as Arrow does",
    "tools_left_out": "{count} conversations have tools that the template does not write; use one that does "
    "(chat_template of the source)",
    "untrained_answers": "{count} answers have the weight 0 and are not trained",
    "reasoning_left_out": "{count} answers are trained without their reasoning, because the template leaves "
    "it out of the history; `sequences: turn` trains each with it",
}


@dataclass
class Notes:
    """Counts of the conversations in the files `read`."""

    settings: RenderSettings
    template: Template
    read: Opened
    fields: set[str] = field(default_factory=set)  # of any row
    noted: Counter[str] = field(default_factory=Counter)  # by the names of NOTES
    num_unwritten: int = 0  # conversations whose reasoning the template leaves out
    _keys: Counter[str] = field(default_factory=Counter)  # conversations with keys for the template

    @property
    def unread(self) -> dict[str, int]:
        """How many conversations have a key that nobody has read; all are rendered by now."""
        return {key: count for key, count in self._keys.most_common() if key not in self.template.asked}

    def add(self, found: Conversation) -> None:
        """Count what the messages of a conversation hold."""
        self.noted["thinking_in_content"] += found.num_thoughts
        self.noted["null_arguments"] += found.num_nulls
        self.noted["untrained_answers"] += len(found.untrained)
        self.noted["tools_left_out"] += bool(found.tools) and not self.template.writes_tools
        self._keys.update(found.unread)

    def counts(self) -> dict[str, Any]:
        """For the record; what is not there is left out, but for the oldest entry."""
        noted = {name: self.noted[name] for name in NOTES if self.noted[name]}
        unread = {"unread_keys": self.unread} if self.unread else {}
        return {"reasoning_not_written": self.num_unwritten, **noted, **unread}

    def tell(self, drops: Drops, num_kept: int) -> None:
        """`UserError` when no row can be used, unless that is allowed; warnings for what is left out."""
        names, template = ", ".join(map(str, self.read)), self.template.name
        if not num_kept and drops.num_rows:
            message = f"{names}: none of {drops.num_rows} rows can be used: {drops.explained()}"
            unasked = drops.num_rows - drops.reasons[FILTERED]
            if unasked > self.settings.max_dropped_fraction * drops.num_rows:
                raise UserError(message)
            logger.warning("%s", message)
        if not num_kept:
            return
        if "strftime_now" in self.template.names:
            date = self.settings.template_date
            logger.info("%s: asks for the date, and is told %s (sft_data.template_date)", template, date)
        for name in self.settings.metadata_fields:
            if name not in self.fields:
                logger.warning("%s: no row has the metadata field %r", names, name)
        for name, explanation in NOTES.items():
            if self.noted[name]:
                logger.warning("%s: %s", names, explanation.format(count=self.noted[name]))
        for key, count in self.unread.items():
            logger.warning("%s: nobody reads the key %r of messages, in %d rows", names, key, count)
        for text in sorted(self.template.opened):
            logger.warning(
                "%s: inference gives the model %r before an answer, but the template does not write it into "
                "a conversation; set off_arguments or template_arguments so that both agree",
                template,
                text,
            )
        if self.num_unwritten:
            logger.warning(
                "%s: the template writes no reasoning; %d conversations are trained without theirs",
                template,
                self.num_unwritten,
            )
