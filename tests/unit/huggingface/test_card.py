"""What the card of an export says of the trainings before it."""

from __future__ import annotations

from snaketron.config import Model
from snaketron.huggingface.card import card
from snaketron.lineage.record import Entry, Record


def test_the_card_names_each_training_and_says_whose_record_is_gone():
    broad, sft = (
        Record("checkpoint", name, "", 0.0, (), (), {}, {}, {"iterations": 1_000, "test_loss": 2.5}, key)
        for name, key in (("pretrain/focused", "0b"), ("sft", "0c"))
    )
    text = card(
        sft, Model(), 512, [broad], [Entry("base", "ckpt/pretrain/broad", version="pretrain/broad-0a")]
    )
    assert [line for line in text.splitlines() if line.startswith(("| pretrain", "| sft"))] == [
        "| pretrain/broad | - | - | - | pretrain/broad-0a, whose record is gone |",
        "| pretrain/focused | 1,000 | 0 | 2.5000 | pretrain/focused-0b |",
        "| sft | 1,000 | 0 | 2.5000 | sft-0c |",
    ]
