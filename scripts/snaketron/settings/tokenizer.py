"""What the jobs on the tokenizer are told.

A tokenizer that is taken from elsewhere lies in a directory: the configured one, or that of its downloads.
"""

from __future__ import annotations

from snaketron.config import Config, Section


class TokenizerSettings(Section):
    """What, with the text or the files of `path`, defines the ids of tokens."""

    path: str | None = None  # directory of a Hugging Face tokenizer; None: one is trained
    vocab_size: int | None = None  # these two define a trained one, and are None for another
    text_field: str | None = None


class TemplateSettings(Section):
    """What says where the chat template comes from; one of both is given."""

    chat_template: str | None = None  # Jinja file
    path: str | None = None  # directory of a tokenizer that comes with a template


def tokenizer_settings(config: Config, directory: str) -> TokenizerSettings:
    """What defines the tokenizer; `directory` is where one lies that is taken."""
    tokenizer = config.tokenizer
    if tokenizer.path:
        return TokenizerSettings(path=directory)
    return TokenizerSettings(vocab_size=tokenizer.vocab_size, text_field=tokenizer.text_field)


def template_settings(config: Config, directory: str) -> TemplateSettings:
    """Where the chat template comes from; `directory` is that of a tokenizer that is taken."""
    if template := config.tokenizer.chat_template:
        return TemplateSettings(chat_template=template)
    return TemplateSettings(path=directory)
