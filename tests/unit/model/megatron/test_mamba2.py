"""The Mamba-2 layer of a CPU against its formulas."""

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron import mamba2, mamba2_layer

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(backend.HAS_GPU, reason="the stand-ins are for machines without a GPU")

BATCH, LENGTH, HEADS, HEAD_DIM, GROUPS, STATE_DIM, WIDTH = 2, 75, 4, 3, 2, 5, 4
INNER, BC = HEADS * HEAD_DIM, GROUPS * STATE_DIM


def sequences(*starts):
    """seq_idx of rows in which a sequence starts at 0 and at each of `starts`."""
    return (torch.arange(LENGTH)[:, None] >= torch.tensor(starts, dtype=torch.long)).sum(1).expand(BATCH, -1)


def mamba_arguments():
    real = {"dtype": torch.float64}
    return {
        "zxbcdt": torch.randn(BATCH, LENGTH, 2 * INNER + 2 * BC + HEADS, **real),
        "conv1d_weight": torch.randn(INNER + 2 * BC, WIDTH, **real),
        "conv1d_bias": torch.randn(INNER + 2 * BC, **real),
        "dt_bias": torch.randn(HEADS, **real),
        "A": -torch.rand(HEADS, **real),
        "D": torch.randn(HEADS, **real),
    }


def scan(arguments, seq_idx):
    return mamba2_layer.mamba_split_conv1d_scan_combined(
        **arguments, chunk_size=128, seq_idx=seq_idx, headdim=HEAD_DIM, ngroups=GROUPS, norm_before_gate=False
    )


def token_by_token(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, seq_idx):
    """The layer as its definition: one token after the other, one head after the other."""
    z, xbc, dt = zxbcdt.split([INNER, INNER + 2 * BC, HEADS], -1)
    dt = F.softplus(dt + dt_bias)
    y = torch.zeros_like(z)
    for b in range(BATCH):
        start = 0
        for t in range(LENGTH):
            if t == 0 or seq_idx[b, t] != seq_idx[b, t - 1]:
                start, states = t, [torch.zeros(HEAD_DIM, STATE_DIM, dtype=z.dtype)] * HEADS
            window = range(max(start, t - WIDTH + 1), t + 1)
            conv = conv1d_bias + sum(xbc[b, s] * conv1d_weight[:, WIDTH - 1 - (t - s)] for s in window)
            x, B, C = F.silu(conv).split([INNER, BC, BC])
            for h in range(HEADS):
                group = h // (HEADS // GROUPS)
                of_head = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
                of_group = slice(group * STATE_DIM, (group + 1) * STATE_DIM)
                update = dt[b, t, h] * torch.outer(x[of_head], B[of_group])
                states[h] = torch.exp(dt[b, t, h] * A[h]) * states[h] + update
                y[b, t, of_head] = states[h] @ C[of_group] + D[h] * x[of_head]
    return y * F.silu(z)


@pytest.mark.parametrize("starts", [(), (1,), (40, 57), (31, 32, 33, 64, 74)])
def test_scan_is_the_recurrence_and_starts_afresh_with_each_sequence(starts):
    arguments, seq_idx = mamba_arguments(), sequences(*starts)
    torch.testing.assert_close(scan(arguments, seq_idx), token_by_token(**arguments, seq_idx=seq_idx))
    if not starts:
        torch.testing.assert_close(scan(arguments, None), scan(arguments, seq_idx))


@pytest.mark.parametrize("starts", [(), (1, 40, 63, 64)])
def test_gradients_are_those_of_the_recurrence(starts):
    """Length 75 is padded to whole chunks of 32."""
    arguments, seq_idx = mamba_arguments(), sequences(*starts)
    given = [value.requires_grad_() for value in arguments.values()]
    weights = torch.randn(BATCH, LENGTH, INNER, dtype=torch.float64)
    expected = torch.autograd.grad((token_by_token(**arguments, seq_idx=seq_idx) * weights).sum(), given)
    found = torch.autograd.grad((scan(arguments, seq_idx) * weights).sum(), given)
    for name, of_scan, of_recurrence in zip(arguments, found, expected, strict=True):
        torch.testing.assert_close(of_scan, of_recurrence, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_do_not_cross_sequences():
    arguments = mamba_arguments()
    inputs = arguments["zxbcdt"].requires_grad_()
    scan(arguments, sequences(40))[:, 40:].sum().backward()
    # Not exactly zero: a decay is the exponential of a difference of sums over the chunk.
    assert inputs.grad[:, :40].abs().max() < 1e-12 and inputs.grad[:, 40:].abs().max() > 1


def test_gradients_survive_a_decay_that_leaves_nothing():
    arguments = mamba_arguments()
    arguments["A"] = torch.full_like(arguments["A"], -1e4)
    arguments = {name: value.float().requires_grad_() for name, value in arguments.items()}
    scan(arguments, sequences(33)).sum().backward()
    assert all(value.grad.isfinite().all() for value in arguments.values())


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 0, 1, 1, 2]])])
def test_gradients_of_the_convolution_are_those_of_autograd(seq_idx):
    x, weight, _ = given = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 6, 3), (3, 4), (3,))
    ]
    grad = torch.randn(1, 6, 3, dtype=torch.float64)
    expected = torch.autograd.grad(mamba2.convolve(*given, seq_idx), given, grad)
    with torch.no_grad():
        found = mamba2.convolve_backward(grad, x, weight, seq_idx, out=(of_x := torch.empty_like(x)))
    for one, other in zip((of_x, *found), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_convolution_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)
    weight, bias = torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    y = mamba2.convolve(x, weight, bias, torch.tensor([[0, 0, 1, 1]]))
    assert y.flatten().tolist() == [1.5, 12.5, 3.5, 34.5]


def test_gated_norm_gates_then_normalizes_each_group():
    norm = mamba2.RMSNormGated(4, eps=0.0, group_size=2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 10.0]))
    x, z = torch.tensor([3.0, 4.0, 1.0, 1.0]), torch.tensor([0.7, 0.7, -2.0, -2.0])
    # The groups have root mean squares sqrt(12.5) and 1, times the gates silu(0.7) > 0 and silu(-2) < 0.
    expected = torch.tensor([3 / 12.5**0.5, 4 / 12.5**0.5, -1.0, -10.0])
    torch.testing.assert_close(norm(x, z), expected)
    torch.testing.assert_close(norm(x), expected.abs())


def test_a_scan_goes_on_from_a_state_and_a_step_is_a_scan_of_one_token():
    """70 tokens at once, and 40, 29 and 1 of them: the chunks of the scan begin elsewhere."""
    heads, groups, width, state_dim = 4, 2, 3, 5
    x, dt = torch.randn(2, 70, heads, width), torch.rand(2, 70, heads)
    B, C = torch.randn(2, 70, groups, state_dim), torch.randn(2, 70, groups, state_dim)
    A = -torch.rand(heads)
    whole, end = mamba2.ssd_scan(x, dt, A, B, C)
    first, state = mamba2.ssd_scan(*(t[:, :40] for t in (x, dt)), A, B[:, :40], C[:, :40])
    then, state = mamba2.ssd_scan(*(t[:, 40:69] for t in (x, dt)), A, B[:, 40:69], C[:, 40:69], state)
    last, state = mamba2.ssd_step(x[:, 69], dt[:, 69], A, B[:, 69], C[:, 69], state)
    torch.testing.assert_close(torch.cat([first, then, last[:, None]], 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-5)
