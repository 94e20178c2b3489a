"""What the jobs are told that register data which was made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from snaketron.config import ChatSource, Config, Corpus, Section
from snaketron.settings.chats import padding_multiple

TOKENS: Final = "registered_tokens"  # kinds of records
PACKS: Final = "registered_packs"


class RegisterSettings(Section):
    """Everything that, with the files and the tokenizer, defines the record of a registered shard."""

    source: str  # name of the corpus, or of the source of conversations
    split: Literal["train", "valid", "test"]
    tokenizer_sha256: str | None = None  # None where nobody said what it was made with

    def tokenizer_differences(self, tokenizer: Path, known: Sequence[str]) -> Iterator[str]:
        """A line where the data was made with another tokenizer than the one in a directory.

        Args:
            known: its hashes, as `known_hashes` gives them.
        """
        if self.tokenizer_sha256 not in (None, *known):
            yield (
                f"it was made with a tokenizer.json of sha256 {self.tokenizer_sha256}, and {tokenizer} has "
                f"{' and '.join(known)}; set tokenizer.path to that tokenizer"
            )


class RegisterPacksSettings(RegisterSettings):
    pack_size: int
    padding_multiple: int = 1


def register_settings(config: Config, source: Corpus | ChatSource, shard: str) -> RegisterSettings:
    """What defines the record of a shard, whose name begins with its split."""
    assert source.registered is not None
    values = {
        "source": source.name,
        "split": shard.partition(".")[0],
        "tokenizer_sha256": source.registered.tokenizer_sha256,
    }
    if isinstance(source, Corpus):
        return RegisterSettings.model_validate(values)
    sizes = {"pack_size": config.sft_data.pack_size, "padding_multiple": padding_multiple(config)}
    return RegisterPacksSettings.model_validate(values | sizes)
