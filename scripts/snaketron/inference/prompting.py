"""What a finished checkpoint is asked with: its chat template, what ends an answer, how much it can read."""

from __future__ import annotations

from snaketron.data.chats.environment import special_tokens
from snaketron.data.chats.mask import end_of_turn
from snaketron.data.chats.template import Template, load_template
from snaketron.data.chats.unusable import Unusable
from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
from snaketron.inference.importing import ENDS, STATED_LENGTH
from snaketron.jobs.version import Version
from snaketron.lineage.record import read
from snaketron.lineage.walk import ancestors
from snaketron.log import UserError
from snaketron.settings.training import settings_of_checkpoint, template_date


def template_of(version: Version) -> Template:
    """Its chat template, which is told the same date as when its conversations were rendered."""
    directory, day = version.tokenizer, template_date(version.describe().run)
    return load_template(directory / "chat_template.jinja", special_tokens(directory), day=day)


def ends_of_answers(version: Version) -> list[int]:
    """The ids that end an answer: the tokenizer's own, and after a tuning that of its chat template.

    Those of a checkpoint from elsewhere are as its generation_config.json said.
    """
    ends = [tokenizer_info(version.tokenizer).eos_id]
    found: list[int | None] = read(version.record).counts.get(ENDS, [])
    if settings_of_checkpoint(version.describe().settings).packed:
        found = [_end_of_turn(version)]
    return ends + [end for end in found if end is not None and end not in ends]


def _end_of_turn(version: Version) -> int | None:
    """The id of the token that ends an answer, by the chat template; None where there is none."""
    try:
        return end_of_turn(template_of(version), load_tokenizer(version.tokenizer))
    except (UserError, Unusable):
        return None  # there may be no template, or one that no conversation was rendered with


def longest_sequence(version: Version) -> int:
    """The longest sequence that a model can be expected to read: of its training or of one before it.

    Packs of a tuning may be shorter than the text before it, and programs refuse or cut what is longer than
    they are told.
    """
    record = read(version.record)
    made_from = [record, *ancestors(record.inputs).values()]
    trained = [one.settings.get("seq_length", 0) for one in made_from if one.kind == "checkpoint"]
    stated = [one.counts.get(STATED_LENGTH, 0) for one in made_from]
    return max(*trained, *stated)
