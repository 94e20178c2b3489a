"""The decoder on a GPU, where Transformer Engine's layers read its memory, against the whole forward pass."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters
from snaketron.inference.decoder import decoding
from snaketron.inference.generate import generate
from snaketron.model.build import BuiltModel, build_model
from snaketron.model.lora import freeze
from snaketron.settings.training import LoraSettings
from tests.gpu import answers
from tests.gpu.answers import PROMPTS, VOCABULARY
from tests.gpu.test_training import LAYOUTS, report

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_process")

# Largest difference of a logit of deviation 0.3 or so; TF32 in Triton's and cuBLAS' products in fp32.
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}


@pytest.fixture(params=TOLERANCE)
def built(request: pytest.FixtureRequest) -> BuiltModel:
    built = build_model(*answers.settings(request.param, {}), VOCABULARY)
    freeze(built.model)
    return built


def logits(built: BuiltModel, ids: list[int]) -> torch.Tensor:
    """The logits of the whole text at once, (length, vocabulary)."""
    text = torch.tensor([ids], device="cuda")
    with built.evaluating():
        return built.module(text, torch.arange(len(ids), device="cuda")[None], None)[0, :, :512].float()


def test_reading_in_parts_gives_the_logits_of_reading_at_once(built: BuiltModel):
    """Beside a row that has read three tokens; in bf16 the third step and those after it are recorded."""
    text = PROMPTS[2]
    whole = logits(built, text)
    with decoding(built, 2, 64) as decoder:
        decoder.read(0, [50, 51, 52])
        rows = [decoder.read(1, text[:8]), decoder.read(1, text[8:20])]
        for i in range(20, 27):
            rows.append(decoder.step(torch.tensor([i, text[i]], device="cuda"))[1:])
        rows.append(decoder.read(1, text[27:30]))  # beside a recording
        rows.append(decoder.step(torch.tensor([53, text[30]], device="cuda"))[1:])
    limit = TOLERANCE[built.settings.model.precision]
    places = (7, 19, *range(20, 27), 29, 30)
    found = [float((row - whole[i]).abs().max()) for row, i in zip(rows, places, strict=True)]
    print(f"{built.settings.model.precision}: logits within {found}, of deviation {float(whole.std()):.2f}")
    assert max(found) < limit


def test_texts_that_begin_together_get_the_logits_of_each_alone(built: BuiltModel):
    """Four texts of 1 to 40 tokens begin beside a row that goes on; in bf16 the last step is recorded."""
    texts = {4: list(range(9, 49)), 0: [8], 3: list(range(60, 91)), 1: [5, 6, 7]}
    with decoding(built, 5, 64) as decoder:
        decoder.read(2, [50, 51])
        rows = [decoder.begin(texts)]
        for token in range(100, 104):
            logits_of_all = decoder.step(torch.full((5,), token, device="cuda"))
            rows.append(logits_of_all[[*texts]])
    limit = TOLERANCE[built.settings.model.precision]
    for place, ids in enumerate(texts.values()):
        whole = logits(built, [*ids, *range(100, 104)])[-5:]
        found = float((torch.stack(rows)[:, place] - whole).abs().max())
        print(f"{built.settings.model.precision}: {len(ids)} tokens and 4 steps within {found:.1e}")
        assert found < limit
    whole = logits(built, [50, 51, *range(100, 104)])
    assert float((logits_of_all[2] - whole[-1]).abs().max()) < limit


@pytest.mark.parametrize("built", ["fp32"], indirect=True)
def test_texts_beside_each_other_get_the_answers_that_each_gets_alone(built: BuiltModel):
    """Not in bf16, in which products over several rows round differently and may choose another token."""
    together = generate(built, PROMPTS, stop=[], max_tokens=8, batch_size=3)
    assert together == [generate(built, [p], stop=[], max_tokens=8)[0] for p in PROMPTS]


@pytest.mark.parametrize("precision", ["fp8_current", "fp8_delayed", "fp8_blockwise"])
def test_a_model_in_fp8_answers_in_bf16(precision: str):
    """Single tokens are no multiple of eight. Whole texts are computed in fp8 again afterwards."""
    in_fp8, in_bf16 = (build_model(*answers.settings(p, {}), VOCABULARY) for p in (precision, "bf16"))
    for built in (in_fp8, in_bf16):
        freeze(built.model)
    before = logits(in_fp8, PROMPTS[2] + [1])
    found, expected = answers.found(in_fp8), answers.found(in_bf16)
    off = differ(found["nats"], expected["nats"])
    after = float((logits(in_fp8, PROMPTS[2] + [1]) - before).abs().max())
    print(f"{precision}: scores within {off:.1e} nats of bf16, logits in fp8 afterwards within {after:.1e}")
    assert off < 1e-3 and [len(ids) for ids in found["answers"]] == [8] * len(PROMPTS)
    assert after < TOLERANCE["bf16"] and not torch.equal(logits(in_bf16, PROMPTS[2] + [1]), before)


def differ(some: list[list[float]], others: list[list[float]]) -> float:
    """The largest difference of the scores of texts, in nats."""
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(np.subtract(one, other)).max()) for one, other in pairs)


@pytest.mark.parametrize("layout", ["tp", "ep", "pp"])
def test_two_gpus_give_the_answers_of_one(layout: str):
    """With experts on two GPUs, one of them may have no token of a step."""
    keys = {"precision": "fp32", "parallel": LAYOUTS[layout]}
    two = report("tests.gpu.answers", keys, 2)
    one = answers.found(build_model(*answers.settings("fp32", {}), VOCABULARY))
    off = differ(two["nats"], one["nats"])
    print(f"{layout}: scores within {off:.1e} nats")
    assert off < 1e-3 and two["answers"] == one["answers"]


@pytest.mark.parametrize("rank", [8, 3])
def test_adapters_of_any_rank_answer(rank: int):
    """The third token of an answer and those after it are recorded."""
    values, run = answers.settings("bf16", {})
    adapters = Adapters(rank=rank, target_modules=["linear_*", "*_proj", "router"])
    built = build_model(LoraSettings(**values.model_dump(), lora=adapters), run, VOCABULARY)
    text = PROMPTS[2]
    whole = logits(built, text)
    with decoding(built, 1, 64) as decoder:
        decoder.read(0, text[:24])
        for i in range(24, 31):
            row = decoder.step(torch.tensor([text[i]], device="cuda"))
    assert float((row - whole[30]).abs().max()) < TOLERANCE["bf16"]
