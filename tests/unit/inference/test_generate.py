"""Continuations of a model that was never trained and has no optimizer, against its whole forward pass."""

from __future__ import annotations

from dataclasses import replace

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters
from snaketron.inference.decoder import Decoder, decoding
from snaketron.inference.generate import Sampling, _next_to_read, choose, continuation, generate
from snaketron.inference.score import Scores, score
from snaketron.model import lora
from snaketron.model.build import BuiltModel, build_model
from snaketron.model.distributed import distributed
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings
from tests.ranks import on_ranks

import numpy as np
import pytest
import torch

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6], [200, 100]]
TEXTS = [ids for ids in PROMPTS if len(ids) > 1]  # the first token of a text has no score


@pytest.fixture
def built(settings) -> BuiltModel:
    return build_model(*settings(), 256)


def logits(built: BuiltModel, ids: list[int]) -> torch.Tensor:
    """The logits of the whole text at once, (length, vocabulary)."""
    with built.evaluating():
        return built.model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, :, :256]


def by_hand(built: BuiltModel, ids: list[int], steps: int) -> list[int]:
    """The argmax of the logits after the whole text, again and again."""
    text = list(ids)
    for _ in range(steps):
        text.append(int(logits(built, text)[-1].argmax()))
    return text[len(ids) :]


def test_each_token_is_the_most_likely_after_all_before_it(built):
    """Five texts in three rows: a text that ends makes room for the next."""
    expected = [by_hand(built, prompt, 4) for prompt in PROMPTS]
    for together in (False, True):
        answers = generate(built, PROMPTS, stop=[], max_tokens=4, batch_size=3, together=together)
        assert answers == expected


def test_each_token_is_a_sign_of_life(built):
    """A part of an evaluation may take hours. The supervisor must hear meanwhile that it goes on."""
    signs: list[int] = []
    alive = replace(built, alive=lambda: signs.append(0))
    generate(alive, [[5, 6, 7]], stop=[], max_tokens=4)
    assert len(signs) == 4
    score(alive, TEXTS, batch_size=2)
    assert len(signs) == 6


def test_adapters_take_part_in_each_token(settings):
    """Every kind of linear layer has an adapter, the router and each expert too."""
    values, run = settings()
    targets = ["linear_*", "*_proj", "router"]
    adapted = LoraSettings(**values.model_dump(), lora=Adapters(target_modules=targets, rank=2))
    built = build_model(adapted, run, 256)
    plain = generate(built, PROMPTS, stop=[], max_tokens=4)
    for _, adapter in lora.adapted(built.model):
        torch.nn.init.normal_(adapter.b, std=0.3)
    answers = generate(built, PROMPTS, stop=[], max_tokens=4)
    assert answers == [by_hand(built, prompt, 4) for prompt in PROMPTS] != plain


def test_reading_in_parts_gives_the_logits_of_reading_at_once(built):
    """A row reads 1, 7 and 1 tokens, beside a row that has read 3 and begins anew."""
    text = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    whole = logits(built, text)
    with decoding(built, 2, 16) as decoder:
        torch.testing.assert_close(decoder.read(1, text[:1]), whole[0:1])
        decoder.read(0, [50, 51, 52])
        torch.testing.assert_close(decoder.read(1, text[1:8]), whole[7:8])
        torch.testing.assert_close(decoder.step(torch.tensor([53, text[8]]))[1:], whole[8:9])
        decoder.forget(0)
        torch.testing.assert_close(decoder.read(0, text), whole[8:9])


def test_texts_that_begin_together_get_the_logits_of_each_alone(built):
    """Texts of 7, 1 and 3 tokens begin in rows 3, 0 and 2; two of these held others, and row 1 goes on."""
    texts = {3: PROMPTS[2], 0: PROMPTS[1], 2: PROMPTS[0]}
    with decoding(built, 4, 16) as decoder:
        decoder.read(1, [50, 51, 52])
        decoder.begin({0: [60, 61, 62, 63, 64], 2: [70, 71]})
        decoder.step(torch.tensor([1, 53, 2, 3]))
        begun = decoder.begin(texts)
        assert decoder.lengths == [1, 4, 3, 7]
        stepped = decoder.step(torch.tensor([20, 54, 22, 23]))
        again = decoder.step(torch.tensor([30, 55, 32, 33]))
    for place, (row, ids) in enumerate(texts.items()):
        whole = logits(built, [*ids, 20 + row, 30 + row])
        found = torch.stack([begun[place], stepped[row], again[row]])
        torch.testing.assert_close(found, whole[-3:])
    torch.testing.assert_close(again[1], logits(built, [*range(50, 56)])[-1])


def test_a_text_alone_begins_with_the_bits_of_one_that_is_read(built):
    with decoding(built, 2, 16) as decoder:
        expected = decoder.read(1, PROMPTS[2])
        assert torch.equal(decoder.begin({1: PROMPTS[2]}), expected)


def test_a_text_that_is_too_long_for_one_pass_is_read_in_pieces(built, monkeypatch):
    """Nine tokens as 4, 4 and 1; and three texts of 3 tokens at most are two passes of 4 tokens and 3."""
    text = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    monkeypatch.setattr("snaketron.inference.decoder.READ_AT_ONCE", 4)
    monkeypatch.setattr("snaketron.inference.generate.READ_AT_ONCE", 4)
    with decoding(built, 1, 16) as decoder:
        last = decoder.read(0, text)
    torch.testing.assert_close(last, logits(built, text)[-1:])
    prompts, waiting = [[1, 2, 3], [4], [5, 6]], [1, 2, 0]
    assert [_next_to_read(waiting, prompts, 3) for _ in range(2)] == [[0], [2, 1]]


def test_texts_that_are_read_together_are_of_like_lengths(built, monkeypatch):
    """Four rows; one is free first, and then begins alone because no other text waits."""
    begun = []
    begin = Decoder.begin

    def spy(decoder: Decoder, texts: dict[int, list[int]]) -> torch.Tensor | None:
        begun.append([len(ids) for ids in texts.values()])
        return begin(decoder, texts)

    monkeypatch.setattr(Decoder, "begin", spy)
    generate(built, PROMPTS, stop=[], max_tokens=4, batch_size=4, together=True)
    assert begun == [[7, 3, 2, 2], [1]]


def test_a_text_that_ends_at_once_leaves_room_for_those_that_go_on(built):
    """Its 14 tokens stay in the row, which has room for 16, while the other text grows by nine."""
    long = list(range(3, 17))
    [end] = by_hand(built, long, 1)
    short = next([n] for n in range(3, 250) if end not in by_hand(built, [n], 9))
    for together in (False, True):
        answers = generate(built, [long, short], stop=[end], max_tokens=9, together=together)
        assert answers == [[end], by_hand(built, short, 9)]


def test_it_ends_with_the_token_that_ends_an_answer(built):
    [whole] = generate(built, [[5, 6, 7]], stop=[], max_tokens=4)
    last = next(i for i, token in enumerate(whole) if token == whole[1])  # where it comes first
    assert generate(built, [[5, 6, 7]], stop=[whole[1]], max_tokens=4) == [whole[: last + 1]]


def test_it_ends_with_the_longest_sequence_of_the_model(built):
    """16 tokens, of which the prompts have 14, 16 and 17."""
    prompts = [list(range(3, 3 + length)) for length in (14, 16, 17)]
    assert [len(answer) for answer in generate(built, prompts, stop=[], max_tokens=9)] == [2, 0, 0]


def test_a_stream_gives_what_a_batch_gives(built):
    expected = by_hand(built, [8], 5)
    with decoding(built, 1, 16) as decoder:
        assert list(continuation(decoder, [8], stop=[], max_tokens=5)) == expected
        assert int(decoder.lengths[0]) == 1 + 4  # the last token is not read before it is needed


def test_draws_depend_on_the_seed_and_the_text_alone(built):
    def drawn(seed: int, batch_size: int, *, together: bool = False) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return generate(
            built,
            PROMPTS,
            stop=[],
            max_tokens=6,
            sampling=sampling,
            batch_size=batch_size,
            together=together,
        )

    assert drawn(1, batch_size=1) == drawn(1, batch_size=4) == drawn(1, batch_size=4, together=True)
    assert drawn(1, batch_size=4) != drawn(2, batch_size=4)


def test_top_p_leaves_the_fewest_tokens_that_reach_it():
    """Probabilities 0.5, 0.3 and 0.2: 0.6 of them are reached by the first two, 0.5 by the first."""
    row = torch.tensor([[0.2, 0.5, 0.3]]).log()

    def seen(top_p: float) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=top_p)
        return sorted({choose(row, sampling, [sampling.draws(n)])[0] for n in range(60)})

    assert [seen(p) for p in (0.0, 0.5, 0.6, 1.0)] == [[1], [1], [1, 2], [0, 1, 2]]


def test_a_low_temperature_is_the_most_likely_token():
    row = torch.tensor([[1.0, 2.0, 1.5]])
    for temperature in (0.01, 1e-320):
        sampling = Sampling(temperature=temperature)
        assert {choose(row, sampling, [sampling.draws(n)])[0] for n in range(20)} == {1}


def test_the_model_is_as_before_afterwards(built):
    before = logits(built, PROMPTS[2])
    generate(built, PROMPTS[:1], stop=[], max_tokens=1)
    assert built.model.mtp_process
    assert torch.equal(logits(built, PROMPTS[2]), before)


def _answers(settings: TrainSettings, run: RunSettings) -> tuple[list[list[list[int]]], list[Scores]]:
    with distributed(1, run):
        built = build_model(settings, run, 256)
        answers = [
            generate(built, PROMPTS, stop=[], max_tokens=4, batch_size=3, together=together)
            for together in (False, True)
        ]
        return answers, score(built, TEXTS, batch_size=3)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "data_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
    ],
    ids=["tp", "ep", "pp", "cp", "pp_cp"],
)
def test_processes_generate_what_one_does_and_give_the_same_scores(built, settings, layout):
    """An evaluation consists of both: losses and tasks are made of scores, exact matches of answers.

    Stages of a pipeline hand all tokens on, although ranks that share a context would each hold a part.
    """
    expected, scores = generate(built, PROMPTS, stop=[], max_tokens=4), score(built, TEXTS)
    values, run = settings(parallel=layout)
    for answers, found in on_ranks(run.parallel.world_size, _answers, values, run):
        assert answers == [expected, expected]
        for here, there in zip(found, scores, strict=True):
            np.testing.assert_allclose(here.nats, there.nats, rtol=1e-5)
            assert here.likeliest.tolist() == there.likeliest.tolist()
