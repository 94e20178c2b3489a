"""LoRA: what an adapter adds, its gradients, and what merging it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, Model
from snaketron.config.linears import linears, matches
from snaketron.log import UserError
from snaketron.model import backend, lora
from tests.unit.sizes.models import SMALL

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

EVERYTHING = ["linear_*", "*_proj", "router"]
PATTERN = "ME*-"


@pytest.fixture
def adapted(build):
    """adapted(**keys of Adapters) gives a model with adapters at every linear layer, B not zero."""

    def make(seed: int = 1, model: dict | None = None, **keys: Any) -> torch.nn.Module:
        built = build(hybrid_layer_pattern=PATTERN, **(model or {}))
        lora.add_adapters(built, Adapters(**{"target_modules": EVERYTHING, "rank": 4} | keys), seed)
        with torch.no_grad():
            for _, adapter in lora.adapted(built):
                adapter.b.normal_(std=0.05)
        return built.eval()

    return make


def batch(length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, labels), each (2, length)."""
    ids = torch.randint(0, 256, (2, length + 1), device=backend.device())
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    return model(ids, positions, None)


def loss(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    return model(ids, positions, None, labels=labels).mean()


# ------------------------------------------------------------------------------------------ one adapter


@pytest.fixture
def by_hand(build) -> lora.Adapter:
    """The adapter of a dense layer's linear_fc1 (3 inputs, 2 outputs), rank 1, alpha 6, in small numbers."""
    config = build(hybrid_layer_pattern="-", mtp_num_layers=0).config
    linear = tensor_parallel.ColumnParallelLinear(3, 2, config=config, init_method=torch.nn.init.zeros_)
    adapter = lora.Adapter(linear, "linear_fc1", Adapters(rank=1, alpha=6), config, expert=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        adapter.a.copy_(torch.tensor([[1.0, 2, 3]]))
        adapter.b.copy_(torch.tensor([[0.5], [-1]]))
    lora._adapt(linear, adapter)
    return linear.eval()


def test_an_adapter_adds_alpha_over_rank_b_a_x(by_hand):
    """x = (1, 1, 2): A x = 9, B of that (4.5, -9), six times (27, -54); W x = (1, 1)."""
    out, _ = by_hand(torch.tensor([[[1.0, 1, 2]]], device=backend.device()))
    assert out.tolist() == [[[28, -53]]]


def test_its_gradients_by_hand(by_hand):
    """The gradients of y[0] at x = (1, 1, 2): 6 B[0] x for A, 6 A x for B[0], and nothing for W."""
    adapter = by_hand.lora
    by_hand.weight.requires_grad_(False)
    out, _ = by_hand(torch.tensor([[[1.0, 1, 2]]], device=backend.device(), requires_grad=True))
    out[0, 0, 0].backward()
    assert adapter.a.grad.tolist() == [[3, 3, 6]] and adapter.b.grad.tolist() == [[54], [0]]
    assert by_hand.weight.grad is None


def test_merged_it_is_in_the_weight(by_hand):
    """W + 6 B A = [[1 + 3, 6, 9], [-6, 1 - 12, -18]]; then the adapter adds nothing."""
    by_hand.lora.merge_into(by_hand)
    assert by_hand.weight.tolist() == [[4, 6, 9], [-6, -11, -18]]
    out, _ = by_hand(torch.tensor([[[1.0, 1, 2]]], device=backend.device()))
    assert out.tolist() == [[[28, -53]]]


def test_dropout_leaves_out_inputs_in_training_alone(by_hand):
    """With half of them left out the others count twice: the mean stays."""
    by_hand.lora.dropout = 0.5
    x = torch.ones(2000, 1, 3, device=backend.device())
    assert by_hand(x)[0][:, 0, 0].unique().tolist() == [19]  # 1 + 6 x 0.5 x (1 + 2 + 3)
    by_hand.train()
    found = by_hand(x)[0][:, 0, 0]
    # Twice the sum of some of 1, 2 and 3.
    assert found.unique().tolist() == [1 + 3 * 2 * n for n in range(7)]
    assert found.mean().item() == pytest.approx(19, abs=1)


# ------------------------------------------------------------------------------------- in the whole model


def test_a_new_adapter_changes_nothing(build):
    """B is zero: the logits are those of the base, bit for bit."""
    model = build(hybrid_layer_pattern=PATTERN).eval()
    ids, _ = batch()
    before = logits(model, ids)
    lora.add_adapters(model, Adapters(target_modules=EVERYTHING), 1)
    assert torch.equal(logits(model.eval(), ids), before)
    assert len(list(lora.adapted(model))) > 20


def test_the_base_is_frozen_and_the_adapters_are_not(adapted):
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}


def test_merged_weights_give_the_logits_of_base_and_adapters(adapted):
    """In every linear layer: attention, Mamba, dense, latent, shared and routed experts, router, MTP."""
    model = adapted()
    ids, _ = batch()
    before = logits(model, ids)
    base = logits(build_without(model), ids)
    lora.merge(model)
    after = logits(model, ids)
    assert (before - base).abs().max() > 0.1  # they do something
    assert (after - before).abs().max() < 1e-5


def build_without(model: torch.nn.Module) -> Any:
    """The same model, called with the adapters silent."""

    def call(*arguments: Any) -> torch.Tensor:
        scales = [(adapter, adapter.scale) for _, adapter in lora.adapted(model)]
        for adapter, _ in scales:
            adapter.scale = 0.0
        found = model(*arguments)
        for adapter, scale in scales:
            adapter.scale = scale
        return found

    return call


def test_gradients_are_those_that_autograd_gives_through_merged_weights(adapted):
    """With W' = W + s B A: dB = s dW' A^T and dA = s B^T dW', from dW' of the merged model."""
    model = adapted()
    ids, labels = batch()
    loss(model, ids, labels).backward()
    pairs = list(lora.adapted(model))
    found = [(adapter.a.grad.clone(), adapter.b.grad.clone()) for _, adapter in pairs]
    factors = [(adapter.a.detach().clone(), adapter.b.detach().clone()) for _, adapter in pairs]

    lora.merge(model)
    for linear, _ in pairs:
        linear.weight.requires_grad_()
    loss(model, ids, labels).backward()
    for (linear, adapter), (grad_a, grad_b), (a, b) in zip(pairs, found, factors, strict=True):
        whole = linear.weight.grad
        for grad, expected in (
            (grad_a, adapter.scale * b.T @ whole),
            (grad_b, adapter.scale * whole @ a.T),
        ):
            error = (grad - expected).norm() / expected.norm().clamp(min=1e-6)
            assert error < 1e-3, (type(linear).__name__, tuple(linear.weight.shape), error.item())


def test_the_seed_and_the_name_decide_a(adapted):
    first, again, other = (dict(adapted(seed=s).named_parameters()) for s in (1, 1, 2))
    names = [name for name in first if name.endswith(".lora.a")]
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)
    assert len({first[name].flatten()[0].item() for name in names}) == len(names)
    a = first["decoder.layers.0.mixer.in_proj.lora.a"]  # of 128 inputs
    assert a.abs().max() <= 128**-0.5 and a.std().item() == pytest.approx(128**-0.5 / 3**0.5, rel=0.1)


def test_experts_may_have_a_rank_of_their_own_and_the_same_scale(adapted):
    model = adapted(rank=4, expert_rank=2, alpha=8)
    ranks = {
        ".experts." in name: p.shape[0] for name, p in model.named_parameters() if name.endswith("lora.a")
    }
    assert ranks == {True: 2, False: 4}
    assert {adapter.scale for _, adapter in lora.adapted(model)} == {2.0}


def test_a_target_that_is_not_there_is_an_error(build):
    with pytest.raises(UserError, match=r"no layer of this model is one of \['q_proj'\]"):
        lora.add_adapters(build(), Adapters(target_modules=["q_proj"]), 1)


def test_a_pipeline_stage_without_a_target_is_an_error(build):
    """A dry-run refuses it, but where the tokenizer has another size than it was told."""
    stage = build()
    stage.config.pipeline_model_parallel_size = 2
    with pytest.raises(UserError, match=r"no layer of pipeline stage 0 of 2 is one of \['q_proj'\]"):
        lora.add_adapters(stage, Adapters(target_modules=["q_proj"]), 1)


# ----------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("target", "experts", "shared", "mtp"),
    [
        ("linear_fc1", True, True, True),
        ("experts.linear_fc1", True, False, True),
        ("shared_experts.linear_fc1", False, True, True),
        ("decoder.*.linear_fc1", True, True, False),
        ("linear_fc2", False, False, False),
    ],
)
def test_a_target_is_the_end_of_a_name(target: str, experts: bool, shared: bool, mtp: bool):
    names = ["decoder.layers.mlp.experts.linear_fc1", "decoder.layers.mlp.shared_experts.linear_fc1"]
    names.append("mtp.layers.mtp_model_layer.layers.mlp.experts.linear_fc1")
    assert [matches(target, name) for name in names] == [experts, shared, mtp and experts]


def test_the_list_of_linear_layers_is_that_of_the_model(build):
    """Names, shapes and numbers, as the configuration is checked with and the memory computed from."""
    model = Model(**(SMALL | {"hybrid_layer_pattern": PATTERN}))
    expected: dict[str, list[tuple[int, ...]]] = {}
    for linear in linears(model, PATTERN, with_mtp=True):
        shapes = expected.setdefault(linear.name, [])
        shapes += [(linear.outputs, linear.inputs)] * max(1, linear.experts)
    built = build(hybrid_layer_pattern=PATTERN)
    lora.add_adapters(built, Adapters(target_modules=["*"]), 1)
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, module in built.named_modules():
        if isinstance(getattr(module, "lora", None), lora.Adapter):
            shapes = [tuple(weight.shape) for weight in lora.weights_of(module)]
            found.setdefault(lora.canonical(name), []).extend(shapes)
    assert found == expected


# ------------------------------------------------------------------------------------- grouped experts


class Grouped(torch.nn.Module):
    """Stands for Transformer Engine's GroupedLinear: the weights of several experts in one module."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.num_gemms = experts
        for i in range(experts):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.randn(outputs, inputs)))

    def forward(self, x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(x.split(counts), lora.weights_of(self), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple, metadata: dict | None) -> dict:
        return {}


@pytest.fixture
def grouped(build):
    """grouped(dtype, rank) gives four grouped experts of 16 inputs and 8 outputs, with adapters."""

    def make(dtype: torch.dtype = torch.float32, rank: int = 8) -> Grouped:
        config = build(hybrid_layer_pattern="E", num_moe_experts=4, mtp_num_layers=0).config
        linear = Grouped(4, 16, 8).to(dtype)
        adapter = lora.Adapter(linear, "linear_fc1", Adapters(rank=rank), config, expert=True)
        with torch.no_grad():
            adapter.a.normal_(std=0.3)
            adapter.b.normal_(std=0.3)
        lora._adapt(linear, adapter)
        return linear.to(backend.device())

    return make


COUNTS = [3, 0, 5, 1]


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 8), ("bfloat16", 8), ("bfloat16", 3)])
def test_grouped_adapters_are_those_of_a_loop_over_experts(grouped, dtype: str, rank: int):
    linear = grouped(getattr(torch, dtype), rank)
    x = torch.randn(9, 16, device=backend.device()).to(getattr(torch, dtype))
    out, _ = linear(x, COUNTS)
    out.float().square().sum().backward()
    found = [out, linear.lora.a.grad, linear.lora.b.grad]

    a, b = (p.detach().double().requires_grad_() for p in (linear.lora.a, linear.lora.b))
    parts = [
        part.double() @ (weight.double() + linear.lora.scale * b[i] @ a[i]).T
        for i, (part, weight) in enumerate(zip(x.split(COUNTS), lora.weights_of(linear), strict=True))
    ]
    expected = torch.cat(parts)
    expected.square().sum().backward()
    for value, wanted in zip(found, [expected, a.grad, b.grad], strict=True):
        error = (value.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == "float32" else 2e-2)
    assert linear.lora.a.grad[1].abs().max() == 0  # nobody visited that one


@pytest.mark.parametrize("rank", [8, 3])
def test_grouped_adapters_ask_the_host_for_no_numbers_of_tokens(grouped, rank: int, monkeypatch):
    """The step of a decoder is recorded on a GPU, and a recording cannot wait for the host."""
    adapter = grouped(torch.bfloat16, rank).lora
    x, ends = torch.randn(9, 16).bfloat16(), torch.tensor(COUNTS).cumsum(0).int()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("the host was asked"))
    assert adapter(x.to(backend.device()), ends.to(backend.device())).shape == (9, 8)


def test_grouped_adapters_merge_into_the_weight_of_each_expert(grouped):
    linear = grouped()
    x = torch.randn(9, 16, device=backend.device())
    before = linear(x, COUNTS)[0]
    linear.lora.merge_into(linear)
    assert torch.allclose(linear(x, COUNTS)[0], before, atol=1e-5)


def test_a_checkpoint_of_experts_in_a_row_loads_into_grouped_ones_and_back(build, grouped, tmp_path: Path):
    """The same keys and whole shapes, however the machine computes them: (experts, rank, inputs)."""
    model = build(
        hybrid_layer_pattern="E",
        num_moe_experts=4,
        moe_latent_size=16,
        moe_ffn_hidden_size=8,
        mtp_num_layers=0,
    )
    lora.add_adapters(model, Adapters(target_modules=["experts.linear_fc1"]), 1)
    linear = grouped()
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1."
    for name in ("there", "back"):
        (tmp_path / name).mkdir()
    one_by_one = lora.Part(model, adapters=True)
    dist_checkpointing.save(one_by_one.sharded_state_dict(groups), tmp_path / "there")
    loaded = dist_checkpointing.load(linear.sharded_state_dict(key, (), groups), tmp_path / "there")
    first = [p for n, p in model.named_parameters() if n.endswith("linear_fc1.lora.a")]
    assert torch.equal(loaded[f"{key}lora.a"], torch.stack(first))

    dist_checkpointing.save(linear.sharded_state_dict(key, (), groups), tmp_path / "back")
    state = dist_checkpointing.load(one_by_one.sharded_state_dict(groups), tmp_path / "back")
    assert not one_by_one.load_state_dict(state, strict=False).missing_keys
    assert torch.equal(torch.stack(first), linear.lora.a)
