"""A step's first micro-batch begins the gradients, whatever the step before left in them."""

from __future__ import annotations

from types import SimpleNamespace

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron import gradients
from snaketron.model.megatron.experts import Experts, stacked
from snaketron.model.megatron.gradients import Beginning, is_new, rest, together, waits

import pytest
import torch

EXPERTS, TOKENS, WIDTH = 3, 40, 16
SIZE = EXPERTS * WIDTH * WIDTH  # numbers in the weights of one product
GAP = 8  # between the gradients of both products, as padding would be


class Layer:
    """A model of one layer of routed experts, whose buffer of gradients holds those of a step before."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        device = backend.device()
        weights = torch.randn(2, EXPERTS, WIDTH, WIDTH, device=device).bfloat16()
        self.parameters = [[torch.nn.Parameter(w) for w in kind.unbind()] for kind in weights.unbind()]
        self.memory = torch.full((2 * SIZE + 2 * GAP,), 7.0, device=device, dtype=torch.bfloat16)
        places = (GAP, 2 * GAP + SIZE)
        self.totals = [self.memory[at : at + SIZE].view(EXPERTS, WIDTH, WIDTH) for at in places]
        stacks = [stacked(kind) for kind in self.parameters]
        self.module = SimpleNamespace(_stacked=(stacks, self.totals))
        self.other = torch.full((4,), 7.0, device=device)  # a gradient of another type
        buffer = SimpleNamespace(grad_data=self.memory, extra_main_grads=[self.other], reset=self.zero)
        self.model = SimpleNamespace(
            buffers=[buffer],
            expert_parallel_buffers=[],
            modules=lambda: [SimpleNamespace(), self.module],
            named_modules=lambda: [("decoder", self.module)],
        )

    def zero(self) -> None:
        self.memory.zero_()
        self.other.zero_()

    def micro_batch(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, WIDTH, generator=generator).to(self.memory).requires_grad_()
        probs = torch.rand(TOKENS, 1, generator=generator).to(x.device)
        ends = torch.tensor([10, 10, TOKENS], dtype=torch.int32, device=x.device)
        firsts = [kind[0] for kind in self.parameters]
        Experts.apply(x, probs, ends, *firsts, self.module._stacked[0], self.totals).sum().backward()


def test_gradients_that_are_written_first_are_those_that_are_added_to_zeros():
    """Of two micro-batches."""
    added, written = Layer(), Layer()
    added.zero()
    for seed in (1, 2):
        added.micro_batch(seed)
    beginning = Beginning(written.model)
    written.model.buffers[0].reset()  # which leaves them from now on
    assert written.memory.eq(7).all()
    with beginning.within():
        written.micro_batch(1)
    written.micro_batch(2)
    assert written.memory.any() and torch.equal(written.memory, added.memory)
    assert written.other.tolist() == [0.0] * 4


def test_each_gradient_is_new_once():
    layer = Layer()
    with Beginning(layer.model).within():
        assert [is_new(total) for total in (*layer.totals, *layer.totals)] == [True, True, False, False]
    assert not is_new(layer.totals[0])


def test_a_gradient_that_was_neither_set_to_zero_nor_written_is_an_error():
    layer = Layer()
    with pytest.raises(RuntimeError, match="1 gradients were not begun"), Beginning(layer.model).within():
        is_new(layer.totals[0])
    assert not gradients._unwritten


class Product(torch.autograd.Function):
    """x weight^T as Transformer Engine does it: the first micro-batch writes the gradient of the weight."""

    @staticmethod
    def forward(ctx, x, weight, first):
        ctx.x, ctx.weight, ctx.first = x, weight, first
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        total = ctx.weight.main_grad
        total.copy_(total * (not ctx.first) + grad.T @ ctx.x)
        return None, None, None


class Linear(torch.nn.Module):
    fuse_wgrad_accumulation, disable_parameter_transpose_cache = True, False

    def __init__(self, total: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones_like(total))
        self.weight.main_grad = total
        self.is_first_microbatch = False

    def forward(self, x):
        first, self.is_first_microbatch = self.is_first_microbatch, False
        return Product.apply(x, self.weight, first)


def linear() -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of a linear layer and one of multi-token prediction, with the gradients of the step before."""
    memory = torch.full((12,), 7.0)
    model = torch.nn.Module()
    model.decoder, model.mtp = Linear(memory[0:4].view(2, 2)), Linear(memory[6:10].view(2, 2))
    model.buffers = [SimpleNamespace(grad_data=memory, extra_main_grads=[])]
    model.expert_parallel_buffers = [SimpleNamespace(grad_data=torch.zeros(0), extra_main_grads=[])]
    return model, memory


def test_the_layers_of_transformer_engine_write_where_they_compute_once():
    """Those of multi-token prediction, which each depth calls, add to zeros."""
    model, memory = linear()
    x = torch.tensor([[1.0, 2.0]])
    with Beginning(model).within():
        (model.decoder(x) + model.mtp(x) + model.mtp(2 * x)).sum().backward()
    assert memory.tolist() == [1, 2, 1, 2, 0, 0, 3, 6, 3, 6, 0, 0]
    (model.decoder(x) + model.mtp(x)).sum().backward()
    assert memory.tolist() == [2, 4, 2, 4, 0, 0, 4, 8, 4, 8, 0, 0]


def test_a_layer_that_computes_twice_in_a_micro_batch_is_an_error():
    """Its first call would write over the gradient of its second one."""
    model, _ = linear()
    x = torch.tensor([[1.0, 2.0]])
    with pytest.raises(RuntimeError, match="1 gradients were not begun"), Beginning(model).within():
        (model.decoder(x) + model.decoder(x)).sum().backward()


def test_what_is_left_of_memory_are_the_pieces_between_the_parts():
    memory = torch.arange(10)
    elsewhere = torch.zeros(3)
    assert [p.tolist() for p in rest(memory, [memory[6:8], elsewhere, memory[0:2], memory[2:3]])] == [
        [3, 4, 5],
        [8, 9],
    ]
    assert rest(memory, [memory]) == []


def test_small_gradients_of_autograd_are_added_together_at_the_end():
    """One of two numbers waits; one that is large, of another type, or added already does not."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (2, gradients.SMALL + 1, 2, 2)]
    small, _, other, added = parameters
    for parameter in parameters:
        parameter.main_grad, parameter.grad = torch.ones_like(parameter), torch.full_like(parameter, 3.0)
        parameter.grad_added_to_main_grad = parameter is added
    other.main_grad = other.main_grad.double()
    assert not waits(small)  # outside of a recording
    with together():
        assert [waits(parameter) for parameter in parameters] == [True, False, False, False]
        assert small.grad is None and small.main_grad.tolist() == [1, 1]
    assert small.main_grad.tolist() == [4, 4] and added.main_grad.tolist() == [1, 1]
    with together():
        pass  # nothing to add
