from __future__ import annotations

from snaketron.data.split import split_of


def test_the_split_follows_from_the_text_alone():
    # the hash of "a" lies at 0.2538
    assert split_of("a", 0.0, 0.0) == "train"
    assert split_of("a", 0.74, 0.0) == "train"
    assert split_of("a", 0.75, 0.0) == "valid"
    assert split_of("a", 0.0, 0.25) == "train"
    assert split_of("a", 0.0, 0.26) == "test"


def test_fractions_are_met():
    splits = [split_of(f"document {i}", 0.2, 0.1) for i in range(10_000)]
    assert abs(splits.count("valid") - 2000) < 150
    assert abs(splits.count("test") - 1000) < 120


def test_a_larger_fraction_only_moves_documents_out_of_train():
    for text in (f"document {i}" for i in range(2000)):
        before, after = split_of(text, 0.1, 0.1), split_of(text, 0.2, 0.2)
        assert before in ("train", after)


def test_lone_surrogates_have_a_split():
    assert split_of("\ud800", 0.1, 0.1) in ("train", "valid", "test")
