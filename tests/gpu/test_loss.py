"""The cross entropy on a GPU against plain PyTorch in double precision."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from tests.gpu.close import relative

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    from snaketron.model.megatron.loss import cross_entropy


@pytest.mark.parametrize("deviation", [0.1, 1.0, 10.0, 40.0])
def test_the_cross_entropy_of_transformer_engine_is_exact(deviation: float):
    """It is for ranks that share the vocabulary. megatron-core warns of versions that rounded twice."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    logits, labels, weights = loss_rows(64, 131_072, torch.bfloat16, deviation)
    expected, gradient = exact_loss(logits, labels, weights)
    leaf = logits.clone().requires_grad_()
    loss = parallel_cross_entropy(leaf * 1, labels, overwrite_input=True)
    (loss * weights).sum().backward()
    found = relative(loss[:, 0], expected), relative(leaf.grad[:, 0], gradient)
    print(f"deviation {deviation}: loss {found[0]:.1e}, gradient {found[1]:.1e}")
    assert found[0] < 1e-5 and found[1] < 3e-3  # bf16 rounds to 1.6e-3
    assert not leaf.grad[::7].any()


def loss_rows(rows: int, classes: int, dtype: torch.dtype, deviation: float = 1.0) -> tuple[Tensor, ...]:
    """Logits (rows, 1, classes), labels of which each seventh is ignored, and factors (rows, 1)."""
    torch.manual_seed(0)
    logits = (deviation * torch.randn(rows, 1, classes, device="cuda")).to(dtype)
    labels = torch.randint(0, classes, (rows, 1), device="cuda")
    labels[::7] = -100
    return logits, labels, torch.rand(rows, 1, device="cuda") + 0.1


def exact_loss(logits: Tensor, labels: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row (rows,) and the gradient (rows, classes) of their sum times the factors."""
    exact = logits[:, 0].double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, labels[:, 0], ignore_index=-100, reduction="none")
    (loss * factors[:, 0]).sum().backward()
    return loss.detach(), exact.grad


@pytest.mark.parametrize("deviation", [0.1, 1.0, 10.0, 40.0])
@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.bfloat16, 131_072), (torch.float32, 131_072), (torch.bfloat16, 50_001)]
)
def test_the_cross_entropy_has_the_loss_and_gradient_of_its_formula(dtype, classes, deviation):
    """With the factors that were expected: the gradient is there after the forward pass."""
    logits, labels, factors = loss_rows(300, classes, dtype, deviation)
    expected = exact_loss(logits, labels, factors)
    leaf = logits.clone().requires_grad_()
    changed = leaf * 1
    loss = cross_entropy(changed, labels, factors)
    there = changed.detach().clone()
    (loss * factors).sum().backward()
    assert torch.equal(leaf.grad, there)
    found = relative(loss[:, 0], expected[0]), relative(leaf.grad[:, 0], expected[1])
    print(f"{dtype}, deviation {deviation}: loss {found[0]:.1e}, gradient {found[1]:.1e}")
    # bf16 rounds to 1.6e-3; fp32 has the exponentials of a difference as large as ten deviations.
    assert found[0] < 1e-5 and found[1] < (3e-3 if dtype == torch.bfloat16 else 3e-5)
    assert not leaf.grad[::7].any()


@pytest.mark.parametrize("expected", [True, False])
def test_the_cross_entropy_is_right_with_factors_that_it_did_not_expect(expected):
    """0 expected and asked for, 0 and something, something and 0, others than expected, of ignored rows too.

    Where nothing is expected, 1 is.
    """
    logits, labels, promised = loss_rows(32, 131_072, torch.bfloat16)
    factors = promised.clone()
    promised[1:5] = 0
    factors[1:3], factors[5:7], factors[7:10], factors[10] = 0, 0, -2.5, 1
    labels[3], labels[8] = -100, -100
    loss_of, gradient = exact_loss(logits, labels, factors)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, labels, promised if expected else None)
    (loss * factors).sum().backward()
    assert relative(loss[:, 0], loss_of) < 1e-5
    for row in range(32):
        if gradient[row].any():
            assert relative(leaf.grad[row, 0], gradient[row]) < 8e-3  # two roundings of up to 3.9e-3
        else:
            assert not leaf.grad[row].any()


def test_the_cross_entropy_has_the_same_bits_each_time():
    logits, labels, factors = loss_rows(1000, 131_072, torch.bfloat16)
    found = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf * 1, labels, factors)
        (loss * factors).sum().backward()
        found.append((loss.detach(), leaf.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


def test_the_cross_entropy_goes_beyond_two_thousand_million_logits():
    """20,000 rows of 131,072: the last ones have the losses and gradients that they have alone."""
    few, labels, _ = loss_rows(8, 131_072, torch.bfloat16)
    logits = few.repeat(2500, 1, 1).requires_grad_()
    loss = cross_entropy(logits, labels.repeat(2500, 1))
    (2 * loss).sum().backward()  # which the forward pass did not expect
    alone = few.clone().requires_grad_()
    expected = cross_entropy(alone, labels)
    (2 * expected).sum().backward()
    assert torch.equal(loss[-8:], expected) and torch.equal(logits.grad[-8:], alone.grad)
    assert torch.equal(loss, expected.repeat(2500, 1))


def test_without_gradients_the_cross_entropy_leaves_the_logits():
    logits, labels, _ = loss_rows(40, 131_072, torch.bfloat16)
    before, leaf = logits.clone(), logits.clone().requires_grad_()
    with torch.no_grad():
        loss = cross_entropy(leaf, labels)
    assert torch.equal(loss, cross_entropy(logits, labels)) and not loss.requires_grad
    assert torch.equal(loss, cross_entropy(leaf * 1, labels))
    assert torch.equal(logits, before) and torch.equal(leaf, before)


def test_the_logits_of_a_cross_entropy_serve_for_nothing_else():
    """Neither for the gradient of another function, nor for a second backward pass."""
    logits, labels, _ = loss_rows(8, 131_072, torch.bfloat16)
    leaf = logits.requires_grad_()
    changed = leaf * 1
    other = changed.square().sum()
    loss = cross_entropy(changed, labels).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()
    loss = cross_entropy(leaf * 1, labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
