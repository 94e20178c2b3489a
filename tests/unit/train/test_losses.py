"""The loss of a step is the average that was asked for, however conversations are packed and divided.

The reference computes each conversation by itself and without padding, and averages by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.tokenizer import tokenizer_info
from snaketron.model.megatron import packed, recording
from snaketron.sizes.flops import training_flops
from snaketron.train.build import build_training
from snaketron.train.loop import Trainer
from snaketron.train.losses import Counts, Report, Sums, Totals
from snaketron.train.sft_batches import SftBatches

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper
from torch.nn.functional import cross_entropy

# Without load balancing, which is that of a pack and of the steps before; large weights show a leak.
MODEL = {
    "hybrid_layer_pattern": "M*E",
    "mtp_num_layers": 2,
    "mtp_hybrid_layer_pattern": "*E",
    "init_method_std": 0.3,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_bias_update_rate": 0.0,
}
MTP_SCALE = 0.3
VOCABULARY = 300


def conversation(seed: int, *turns: tuple[int, int]) -> list[tuple[int, int]]:
    """Random ids; turns are (tokens, whether they are the assistant's)."""
    ids = torch.randint(3, 290, (sum(n for n, _ in turns),), generator=torch.Generator().manual_seed(seed))
    said = [by for n, by in turns for _ in range(n)]
    return list(zip(ids.tolist(), said, strict=True))


# Conversations with very different numbers of trained tokens, so that the averages differ.
A = conversation(1, (3, 0), (1, 1))  # one trained token: nothing for multi-token prediction to predict
B = conversation(2, (2, 0), (6, 1))
C = conversation(3, (1, 0), (2, 1), (3, 0), (4, 1))
D = conversation(4, (4, 0), (11, 1))
E = conversation(5, (5, 0), (2, 1))
CONVERSATIONS = [A, B, C, D, E]
PACKED = [[A, B], [C], [D], [E]]


@pytest.fixture
def trainer_of(sft_settings, packed_blend, tokenizer_dir):
    def make(packs: list, model: dict | None = None, **keys) -> tuple[Trainer, SftBatches]:
        settings, run = sft_settings(MODEL | (model or {}), global_batch_size=len(packs), **keys)
        blend = packed_blend(settings.seq_length, train={"a": packs})
        trainer = Trainer(build_training(settings, run, VOCABULARY))
        trainer.seconds = 1.0
        trainer.sources = ("a",)
        return trainer, SftBatches.load(blend, settings, tokenizer_info(tokenizer_dir), eval_samples=1)

    return make


def gradients(trainer: Trainer, batches: SftBatches, first: int = 0) -> dict[str, torch.Tensor]:
    """The gradients of one step over all packs, as the optimizer gets them."""
    trainer.parallel_model.zero_grad_buffer()
    count = trainer.settings.global_batch_size
    trainer._add_up(trainer._forward_backward(batches, first), count)
    return {name: p.main_grad.clone() for name, p in trainer.model.named_parameters()}


def depths_of(trainer: Trainer, conversation: list) -> Iterator[tuple[torch.Tensor, int]]:
    """Sum of the losses of the trained tokens and their number, for the next token and for each depth."""
    ids, said = (torch.tensor(column) for column in zip(*conversation, strict=True))
    logits: list[torch.Tensor] = []
    hook = trainer.model.output_layer.register_forward_hook(
        lambda *call: logits.append(call[2][0][:, 0].clone())
    )
    trainer.model(ids[None], torch.arange(len(ids))[None], None)
    hook.remove()
    *predicted, now = logits  # multi-token prediction comes first
    for ahead, rows in enumerate([now, *predicted], start=1):
        losses = cross_entropy(rows[: len(ids) - ahead].float(), ids[ahead:], reduction="none")
        yield (losses * said[ahead:]).sum(), int(said[ahead:].sum())


def reference(trainer: Trainer, conversations: list, average: str) -> dict[str, torch.Tensor]:
    """The loss, by depth under `losses`, and its gradients."""
    trainer.model.zero_grad()
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(0.0)  # megatron-core's own loss stays out
    sums = [list(depths_of(trainer, c)) for c in conversations]
    losses = []
    for depth in zip(*sums, strict=True):
        used = [(total, number) for total, number in depth if number]
        if average == "token":
            losses.append(sum(total for total, _ in used) / sum(number for _, number in used))
        else:
            losses.append(sum(total / number for total, number in used) / len(used))
    loss = losses[0] + MTP_SCALE / 2 * (losses[1] + losses[2])
    parameters = dict(trainer.model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    MTPLossLoggingHelper.clean_metrics_in_tracker()
    zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True))
    return dict(zip(parameters, zeros, strict=True)) | {"losses": torch.stack(losses).detach()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_a_step_has_the_gradients_of_the_average_over_its_conversations(trainer_of, average):
    """Four packs, so four micro-batches; nothing but the average is the same as that of the reference."""
    trainer, batches = trainer_of(PACKED, loss_average=average)
    found = gradients(trainer, batches)
    expected = reference(trainer, CONVERSATIONS, average)
    assert_same(found, expected)
    line = trainer._line(0.0)
    losses = [line["loss" if average == "token" else "sample_loss"], line["mtp_1_loss"], line["mtp_2_loss"]]
    assert losses == pytest.approx(expected["losses"].tolist(), abs=1e-4)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_packing_changes_no_gradient(trainer_of, average):
    found = {}
    for how, packs in {
        "packed": [[A, B], [C], [D], [E]],
        "packed otherwise": [[B], [E, A], [D], [C]],
        "unpacked": [[c] for c in CONVERSATIONS],
    }.items():
        trainer, batches = trainer_of(packs, loss_average=average)
        found[how] = gradients(trainer, batches)
        line = trainer._line(0.0)
        losses = [
            line["loss" if average == "token" else "sample_loss"],
            line["mtp_1_loss"],
            line["mtp_2_loss"],
        ]
        norm = sum(g.double().square().sum() for g in found[how].values()).sqrt()
        print(f"{average}, {how}: losses {losses}, gradient norm {norm:.6f}")
    assert_same(found["packed"], found["packed otherwise"])
    assert_same(found["packed"], found["unpacked"])


@pytest.mark.parametrize("depths", [0, 2])
def test_losses_are_computed_with_the_factors_that_their_gradients_get(trainer_of, monkeypatch, depths):
    """To the bit, for the next token and each depth: the kernel of a GPU multiplies nothing again then."""
    compute, expected, found = LanguageModule.compute_language_model_loss, [], {}

    def watched(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        losses, number = compute(self, labels, logits), len(expected)
        expected.append(packed.Expected.take())
        losses.register_hook(lambda grad: found.update({number: grad}))
        return losses

    monkeypatch.setattr(LanguageModule, "compute_language_model_loss", watched)
    trainer, batches = trainer_of(PACKED, {"mtp_num_layers": depths}, loss_average="sample")
    gradients(trainer, batches)
    assert len(expected) == len(found) == len(PACKED) * (1 + depths)
    for number, factors in enumerate(expected):
        assert torch.equal(factors, found[number])
    assert len(torch.cat(expected).unique()) > 4


def test_the_two_averages_are_not_the_same(trainer_of):
    token, sample = (gradients(*trainer_of(PACKED, loss_average=by)) for by in ("token", "sample"))
    difference = max(
        float((token[n] - sample[n]).abs().max() / token[n].abs().max().clamp(min=1e-6)) for n in token
    )
    assert difference > 0.1


def test_the_loss_is_averaged_the_other_way_after_some_steps(trainer_of):
    """The first step by token, from the second on by sample; each step sees all four packs."""
    trainer, batches = trainer_of(PACKED, switch_loss_average_after=1)
    steps = [gradients(trainer, batches, first) for first in (0, 4, 8)]
    assert_same(steps[0], reference(trainer, CONVERSATIONS, "token"))
    for step in steps[1:]:
        assert_same(step, reference(trainer, CONVERSATIONS, "sample"))


def test_no_gradient_crosses_from_one_conversation_to_another(trainer_of):
    """Only the second conversation is trained.

    Tokens of the first get what rounding leaves of the cumulative sums in the scan, and the padding after it
    nothing.
    """
    silent = [(token, 0) for token, _ in B]
    trainer, batches = trainer_of([[silent, E]])
    gradient = gradients(trainer, batches)["embedding.word_embeddings.weight"].abs().sum(1)
    first, second = ([token for token, _ in c] for c in (B, E))
    assert set(first).isdisjoint(second)
    assert gradient[second[:-1]].min() > 1
    assert gradient[first].max() < 1e-6
    assert not gradient[second[-1]] and torch.count_nonzero(gradient) <= len(first) + len(second) - 1


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_a_conversation_has_its_loss_wherever_it_lies_in_a_pack(trainer_of, order):
    """From packs in which only that one is trained."""
    three = [
        conversation(7, (1, 0), (3, 1)),
        conversation(8, (2, 0), (4, 1)),
        conversation(9, (2, 0), (3, 1)),
    ]
    for which in range(3):
        silenced = [c if i == which else [(t, 0) for t, _ in c] for i, c in enumerate(three)]
        trainer, batches = trainer_of([[silenced[i] for i in order]])
        gradients(trainer, batches)
        expected = reference(trainer, [three[which]], "token")["losses"].tolist()
        line = trainer._line(0.0)
        assert [line["loss"], line["mtp_1_loss"], line["mtp_2_loss"]] == pytest.approx(expected, abs=1e-4)


def test_the_work_of_a_step_is_that_of_its_conversations(trainer_of):
    """A token of 64 sees half of its conversation of 4, 8, 10, 15 or 7 tokens, and not of its pack of 16."""
    trainer, batches = trainer_of(PACKED)
    for _ in range(2):
        trainer._step(batches)
    length = sum(len(c) ** 2 for c in CONVERSATIONS) / 64
    assert length == 454 / 64
    model = trainer.settings.model
    assert trainer.clock.tokens == 2 * 64
    assert trainer.clock.flops / trainer.clock.tokens == training_flops(model, VOCABULARY, length)


def test_routers_count_no_padding(trainer_of):
    """A token visits two experts, in multi-token prediction at each of two depths; 11 of 32 are padding."""
    trainer, batches = trainer_of([[A, E], [C]])
    tokens = len(A) + len(E) + len(C)
    assert tokens == 32 - 11
    for batch in batches.micro_batches("train", 0, 2):
        del batch["report"]
        trainer.model(attention_mask=None, **batch)
    found = {
        name: int(module.local_tokens_per_expert.sum())
        for name, module in trainer.model.named_modules()
        if isinstance(module, TopKRouter)
    }
    decoder, mtp = found.values()
    assert list(found)[1].startswith("mtp.") and (decoder, mtp) == (2 * tokens, 2 * 2 * tokens)


def test_a_step_over_a_pack_of_256k_tokens(trainer_of):
    """256 conversations, of which one trains its last two tokens: its loss is that of it alone.

    The work of attention and of Mamba-2 grows with the heads, and what 256k tokens ask of the rest does not.
    """
    silent = [[(3 + (i + j) % 280, 0) for i in range(1024)] for j in range(255)]
    one = conversation(5, (1022, 0), (2, 1))
    packs = [[*silent[:40], one, *silent[40:]]]
    few_heads = {"num_attention_heads": 2, "num_query_groups": 1, "mamba_num_heads": 2, "mamba_num_groups": 1}
    trainer, batches = trainer_of(packs, few_heads | {"mtp_num_layers": 0}, pack_size=262_144)
    gradients(trainer, batches)
    loss, number = next(depths_of(trainer, one))
    assert trainer._line(0.0)["loss"] == pytest.approx(float(loss) / number, abs=1e-4)


def test_a_report_sums_each_loss_and_count_by_name_and_source():
    """Losses 1, 2 and 3: the first two positions are trained, the second is a conversation of its own."""
    weights = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 1.0, 0.0]]])
    report = Report(weights, Counts(2, 1, 3, 1).tensor(), torch.tensor([1]), num_sources=2)
    sums = report.sums(torch.tensor([[1.0, 2.0, 3.0]]))
    assert {name: sums[name].tolist() for name in Sums.NAMES} == {
        "loss": [0, 3],
        "trained_tokens": [0, 2],
        "sample_loss": [0, 2],
        "conversations": [0, 1],
        "tokens": [0, 3],
        "packs": [0, 1],
    }
    assert report.tokens == 3


def test_a_report_sums_the_sequences_of_each_source():
    """Four sequences of two tokens, of the sources 2, 0, 2 and 2 of three; their losses are 1 to 8."""
    weights = torch.stack([torch.ones(4, 2), torch.full((4, 2), 0.5)])
    sources = torch.tensor([2, 0, 2, 2])
    report = Report(weights, Counts(8, 4, 8, 4).tensor(), sources, num_sources=3, mixed=True)
    sums = report.sums(torch.arange(1.0, 9.0).reshape(4, 2))
    assert {name: sums[name].tolist() for name in Sums.NAMES} == {
        "loss": [7, 0, 29],
        "trained_tokens": [2, 0, 6],
        "sample_loss": [3.5, 0, 14.5],
        "conversations": [1, 0, 3],
        "tokens": [2, 0, 6],
        "packs": [1, 0, 3],
    }
    assert sums.means() | {"packs": 4} == sums.means() and sums.means()["loss"] == 36 / 8
    assert sums.means_of(2) == {"loss": 29 / 6, "trained_tokens": 6, "samples": 3}
    assert float(sums.total("tokens")) == 8


def test_sources_change_no_bit_of_the_sums_over_all():
    """What a training reported before it knew the corpora of its sequences, and what they add up to."""
    losses, weights = 10 * torch.rand(8, 1000), torch.ones(2, 8, 1000)
    counts = Counts(8000, 8, 8000, 8).tensor()
    before = Report(weights, counts, torch.zeros(8)).sums(losses)
    found = Report(weights, counts, torch.arange(8) % 3, num_sources=3, mixed=True).sums(losses)
    assert torch.equal(found.values[0], before.values[0])
    torch.testing.assert_close(found.by_source.sum(0), before.values[0], rtol=1e-6, atol=0)


def test_a_recording_takes_the_sources_of_a_later_micro_batch():
    """The report of a recording is computed again from the memory into which the next one's is copied."""
    losses = torch.rand(3, 4)

    def report(weight: float, tokens: int, sources: list[int], num_sources: int = 2) -> dict[str, Report]:
        counts = Counts(tokens, 3, tokens, 3).tensor()
        weights = weight * torch.ones(2, 3, 4)
        return {"report": Report(weights, counts, torch.tensor(sources), num_sources, mixed=True)}

    batches = [report(1.0, 12, [0, 0, 1]), report(0.5, 9, [1, 0, 1])]
    assert recording._constants(batches[0]) == recording._constants(batches[1])
    kept = recording._copies(batches[0])
    recording._refill(kept, batches[1])
    expected = batches[1]["report"].sums(losses).values
    assert torch.equal(kept["report"].sums(losses).values, expected)
    assert not torch.equal(batches[0]["report"].sums(losses).values, expected)
    other = report(1.0, 12, [0, 0, 1], num_sources=3)
    assert recording._constants(other) != recording._constants(batches[0])


def test_losses_are_means_and_counts_stay_counts():
    """Two sources: 6 nats over 3 tokens and 4 over 1; a source without tokens has the loss 0."""
    sums = Sums.zeros(3)
    sums["loss"][:2] = torch.tensor([6.0, 4.0])
    sums["trained_tokens"][:2] = torch.tensor([3.0, 1.0])
    sums["sample_loss"][0], sums["conversations"][0] = 3.0, 2.0
    assert [sums.means_of(source)["loss"] for source in range(3)] == [2.0, 4.0, 0.0]
    assert (sums.means()["loss"], sums.means()["trained_tokens"]) == (2.5, 4)
    assert (sums.means()["sample_loss"], sums.means()["conversations"]) == (1.5, 2)


def test_totals_come_back_from_a_checkpoint():
    """Two steps; then cleared, with the sources still there."""
    totals, step = Totals(), Sums.zeros(2)
    step["loss"][1] = 5.0
    totals.add(step, 0.25, [2.0, 3.0])
    totals.add(step, 0.5, [4.0, 6.0])
    assert totals.saved()["means"] == [2.0, 0.75, 6.0, 9.0]
    again = Totals.of_saved(totals.saved())
    assert again.sums["loss"].tolist() == [0, 10]
    assert (again.steps, again.load_balancing, again.mtp) == (2.0, 0.75, [6.0, 9.0])
    again.clear()
    assert again.saved() == {"sums": [[0.0] * 6] * 2, "means": [0.0, 0.0, 0.0, 0.0]}


def test_totals_of_mixed_sources_come_back_from_a_checkpoint():
    """Between lines of metrics the sources are saved too; after one, a checkpoint is as it was without."""
    totals, step = Totals(), Sums.zeros(2, mixed=True)
    step.values[:] = torch.tensor([[9.0], [4.0], [5.0]])
    totals.add(step, 0.5, [2.0])
    assert totals.saved() == {"sums": [[9.0] * 6], "means": [1, 0.5, 2], "sources": [[4.0] * 6, [5.0] * 6]}
    again = Totals.of_saved(totals.saved())
    again.add(step, 0.5, [2.0])
    assert again.sums["loss"].tolist() == [8, 10] and again.sums.total("loss") == 18
    again.clear()
    assert again.saved() == {"sums": [[0.0] * 6], "means": [0, 0, 0]}
    again = Totals.of_saved(again.saved())
    again.add(step, 0.5, [2.0])
    assert again.saved() == totals.saved()
