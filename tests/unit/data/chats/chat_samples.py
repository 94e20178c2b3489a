"""Small tokenizers and conversations that the tests of the SFT data share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

TEMPLATE = Path(__file__).parents[4] / "config" / "chat_template.jinja"
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEXT = [
    "What is the capital of France? The capital of France is Paris.",
    "What is two plus two? Two plus two is four. user assistant system tool",
    '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}',
]


def build_tokenizer(trim_offsets: bool = False, added: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE of 400 tokens; `trim_offsets` leaves spaces out of the offsets, as GPT-2's does.

    `added` are special tokens beside those.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def save_tokenizer(directory: Path, added: Sequence[str] = ()) -> Path:
    """A directory as rule build_tokenizer and install_chat_template leave it."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer(added=added).save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return directory


def question(text: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
