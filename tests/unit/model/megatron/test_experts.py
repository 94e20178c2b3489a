"""The experts of a GPU against a loop over them in double precision."""

from types import SimpleNamespace

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron import gpu, gradients
from snaketron.model.megatron.experts import Experts, _accumulate, frozen_experts, stacked

import torch

COUNTS, INPUTS, INNER = [70, 0, 1, 129], 64, 96  # of tokens for each expert, and widths


def errors(dtype: torch.dtype, *, in_fp8: bool = False) -> list[float]:
    """Relative errors of the output, and of the gradients of input, probabilities and both weights."""
    torch.manual_seed(0)
    tokens, device = sum(COUNTS), backend.device()
    x, probs = torch.randn(tokens, INPUTS, device=device), torch.rand(tokens, 1, device=device)
    buffers = [torch.randn(4, *s, device=device) / 8 for s in ((INNER, INPUTS), (INPUTS, INNER))]
    weight = torch.randn(tokens, INPUTS, device=device)

    exact = [t.double().requires_grad_() for t in (x, probs, *buffers)]
    parts = []
    for i, rows in enumerate(torch.arange(tokens, device=device).split(COUNTS)):
        hidden = torch.relu(exact[0][rows] @ exact[2][i].T) ** 2 * exact[1][rows]
        parts.append(hidden @ exact[3][i].T)
    expected = torch.cat(parts)
    (expected * weight).sum().backward()

    # As DistributedDataParallel lays them out: parameters that are parts of one piece of memory.
    memory = [buffer.to(dtype) for buffer in buffers]
    weights = [[torch.nn.Parameter(part) for part in m.unbind()] for m in memory]
    stacks = tuple(stacked(w) for w in weights)
    grads = tuple(torch.ones_like(buffer) for buffer in buffers)  # of micro-batches before
    a, p = x.to(dtype).requires_grad_(), probs.clone().requires_grad_()
    ends = torch.tensor(COUNTS, device=device).cumsum(0).int()
    rounded = None
    if in_fp8:
        from snaketron.model.megatron import experts8

        rounded = tuple(experts8.empty(m) for m in memory)
        for full, short in zip(memory, rounded, strict=True):
            experts8.round_weights(full, short)
    out = Experts.apply(a, p, ends, weights[0][0], weights[1][0], stacks, grads, rounded)
    (out * weight).sum().backward()
    assert all(w[0].grad_added_to_main_grad for w in weights)
    found = [out, a.grad, p.grad, grads[0] - 1, grads[1] - 1]
    wanted = [expected, *(t.grad for t in exact)]
    return [float((f.double() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]


def test_experts_are_those_of_a_loop_over_them():
    if backend.HAS_GPU:  # its kernel is for bf16, of which a product has 8 bits
        assert max(errors(torch.bfloat16)) < 2e-2
    else:
        assert max(errors(torch.float32)) < 1e-5


def test_the_first_product_of_a_step_is_written_and_the_next_one_is_added():
    """Of two experts one has two rows of ones, whose product is 2, and one has none."""
    grad, inputs = (torch.ones(2, width, device=backend.device()).bfloat16() for width in (8, 16))
    ends = torch.tensor([2, 2], device=backend.device(), dtype=torch.int32)
    total = torch.full((2, 8, 16), 7.0, device=backend.device(), dtype=torch.bfloat16)
    gradients._unwritten.add(total.data_ptr())
    for expected in (2, 4):
        _accumulate(total, grad, inputs, ends)
        assert total[0].eq(expected).all() and total[1].eq(0).all()


def test_tensors_are_stacked_only_where_they_follow_each_other():
    memory = torch.arange(24.0)
    parts = [part.view(2, 3) for part in memory.chunk(4)]
    found = stacked(parts)
    assert found is not None and torch.equal(found, memory.view(4, 2, 3))
    assert stacked(parts[::-1]) is None
    assert stacked([parts[0], parts[2]]) is None
    assert stacked([p.T for p in parts]) is None
    alone = [torch.empty(0).set_(memory.untyped_storage()[i : i + 24], 0, (2, 3)) for i in (0, 24)]
    assert alone[1].data_ptr() == alone[0].data_ptr() + 24 and stacked(alone) is None


def test_frozen_experts_are_the_trained_ones_and_pass_gradients_on():
    """The same output, and gradients that differ by rounding; the weights get none.

    The trained ones take relu(hidden) from the output of their activation.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if backend.HAS_GPU else torch.float32
    tokens, device = sum(COUNTS), backend.device()
    x = torch.randn(tokens, INPUTS, device=device).to(dtype)
    probs = torch.rand(tokens, 1, device=device)
    memory = [torch.randn(4, *s, device=device).to(dtype) / 8 for s in ((INNER, INPUTS), (INPUTS, INNER))]
    weights = (memory[0], memory[1])
    ends = torch.tensor(COUNTS, device=device).cumsum(0).int()
    results = []
    for frozen in (False, True):
        a, p = x.clone().requires_grad_(), probs.clone().requires_grad_()
        if frozen:
            out = frozen_experts(a, p, ends, weights)
        else:
            first = [torch.nn.Parameter(m[0]) for m in memory]
            grads = (torch.zeros_like(memory[0]), torch.zeros_like(memory[1]))
            out = Experts.apply(a, p, ends, *first, weights, grads)
        out.float().square().sum().backward()
        results.append([out, a.grad, p.grad])
    (out, *gradients), (frozen_out, *frozen_gradients) = results
    assert torch.equal(out, frozen_out)
    for trained, frozen_one in zip(gradients, frozen_gradients, strict=True):
        assert (trained - frozen_one).norm() / frozen_one.norm() < (1e-2 if backend.HAS_GPU else 1e-6)


def test_a_row_of_no_probability_has_no_gradient():
    """Its output says nothing of what was before the activation."""
    dtype = torch.bfloat16 if backend.HAS_GPU else torch.float32
    memory = [torch.ones(1, 16, 16, device=backend.device(), dtype=dtype) for _ in range(2)]
    grads = (torch.zeros_like(memory[0]), torch.zeros_like(memory[1]))
    x = torch.ones(2, 16, device=backend.device(), dtype=dtype, requires_grad=True)
    probs = torch.tensor([[0.0], [0.5]], device=backend.device(), requires_grad=True)
    ends = torch.tensor([2], device=backend.device(), dtype=torch.int32)
    first = [torch.nn.Parameter(m[0]) for m in memory]
    Experts.apply(x, probs, ends, *first, (memory[0], memory[1]), grads).sum().backward()
    assert x.grad is not None and probs.grad is not None
    assert x.grad[0].abs().max() == 0 and probs.grad[0] == 0
    # The sum of 16 outputs, each of 16 squares of 16: 16 * 16 * p * 16^2.
    assert probs.grad[1] == 16 * 16 * 256 and (x.grad[1] == 16 * 16 * 0.5 * 2 * 16).all()


def test_adapters_join_both_products_of_frozen_experts():
    """One expert, by hand: fc1 = 2 with 1 added, squared, times 0.5, then fc2 = 3 with 10 added."""
    dtype, device = torch.bfloat16 if backend.HAS_GPU else torch.float32, backend.device()
    x = torch.eye(16, device=device, dtype=dtype)[:1]
    weights = tuple(torch.eye(16, device=device, dtype=dtype)[None] * w for w in (2, 3))
    ends = torch.tensor([1], device=device, dtype=torch.int32)
    probs = torch.full((1, 1), 0.5, device=device)
    adapters = [lambda x, ends: x, lambda x, ends: 10 * x]
    out = frozen_experts(x, probs, ends, weights, adapters)
    assert out[0, 0].item() == (2 + 1) ** 2 * 0.5 * (3 + 10) and out[0, 1:].abs().max() == 0


def test_experts_without_tokens_add_nothing(monkeypatch):
    """Where processes share experts: in bf16 too, in which Transformer Engine's would write zeros."""
    monkeypatch.setattr(gpu, "_rounded", lambda module: None)
    device, layers, totals = backend.device(), [], []
    for inner in ((INNER, INPUTS), (INPUTS, INNER)):
        memory, total = torch.ones(2, 4, *inner, device=device).unbind()
        layer = SimpleNamespace(num_gemms=4)
        for i, (part, grad) in enumerate(zip(memory.bfloat16(), total, strict=True)):
            weight = torch.nn.Parameter(torch.empty(0))
            weight.data, weight.main_grad = part, grad
            setattr(layer, f"weight{i}", weight)
        layers.append(layer)
        totals.append(total)
    module = SimpleNamespace(config=SimpleNamespace(fp4=None), linear_fc1=layers[0], linear_fc2=layers[1])
    x = torch.empty(0, INPUTS, device=device, dtype=torch.bfloat16, requires_grad=True)
    probs = torch.empty(0, device=device, requires_grad=True)
    out = gpu._our_experts(module, x, torch.zeros(4, dtype=torch.long), probs)
    assert out is not None and out.shape == (0, INPUTS)
    monkeypatch.setattr(gradients, "_unwritten", {totals[1].data_ptr()})  # which this product begins
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and probs.grad is not None
    assert (totals[0] == 1).all() and (totals[1] == 0).all()
    for layer in layers:  # so that processes that wait for all gradients get word of these
        assert layer.weight0.grad_added_to_main_grad and layer.weight0.grad is not None


def test_frozen_experts_without_tokens_give_adapters_zeros():
    weights = tuple(torch.ones(4, *s, device=backend.device()) for s in ((INNER, INPUTS), (INPUTS, INNER)))
    added = torch.ones(INNER, INPUTS, device=backend.device(), requires_grad=True)
    x, probs = weights[0].new_empty(0, INPUTS), weights[0].new_empty(0, 1)
    ends = torch.zeros(4, dtype=torch.int32, device=backend.device())
    out = frozen_experts(x, probs, ends, weights, (lambda x, ends: x @ added.T, None))
    out.sum().backward()
    assert out.shape == (0, INPUTS) and added.grad is not None and not added.grad.any()
