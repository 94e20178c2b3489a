"""How often a training goes through a corpus."""

from __future__ import annotations

from snaketron.sizes.epochs import resized


def test_the_blend_of_another_length_is_known_without_making_it():
    """Half of 1,000 tokens is taken of a corpus of 400: 1.25 epochs; of 3,000 tokens it is 3.75."""
    corpus = {"corpus": "a", "share": 0.5, "tokens": 400, "taken": 500, "epochs": 1.25}
    of = {"phase": "one", "train_tokens": 1000, "train": {"corpora": [corpus]}}
    made = resized(of, 3000)
    assert made["train_tokens"] == 3000
    assert made["train"]["corpora"] == [corpus | {"taken": 1500, "epochs": 3.75}]
    assert resized(made, 1000) == of and list(made) == list(of)
