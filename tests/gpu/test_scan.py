"""The kernels of Mamba layers against plain PyTorch in double precision."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import mamba2, mamba2_layer
from tests.gpu.close import TOLERANCE, gradients, relative

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if torch.cuda.is_available():
    from snaketron.model.megatron import scan_convolution


class ScanCase:
    """A Mamba layer between its projections: its inputs, and three functions that compute it."""

    def __init__(self, dtype: torch.dtype, packed: bool, shape: tuple[int, ...], *, wide_d: bool = False):
        torch.manual_seed(0)
        batch, length, self.heads, self.width, self.groups, state = shape
        inner = self.heads * self.width
        conv = inner + 2 * self.groups * state

        def random(*size: int, like: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*size, device="cuda")).to(like)

        self.inputs = {
            "zxbcdt": random(batch, length, inner + conv + self.heads),
            "conv1d_weight": random(conv, 4, scale=0.5),
            "conv1d_bias": random(conv, scale=0.1),
            "dt_bias": random(self.heads, like=torch.float32),
            "A": -torch.rand(self.heads, device="cuda") * 4 - 1,
            "D": random(*((self.heads, self.width) if wide_d else (self.heads,)), like=torch.float32),
        }
        sequence = torch.zeros(batch, length, dtype=torch.int32, device="cuda")
        sequence[:, length // 5 :], sequence[:, length * 2 // 3 :] = 1, 2
        self.sequence = sequence if packed else None
        self.weight = torch.randn(batch, length, inner, device="cuda")

    def of_mamba_ssm(self) -> list[Tensor]:
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        def function(zxbcdt: Tensor, **x: Tensor) -> Tensor:
            width = None if x["D"].dim() == 2 else self.width
            options = {"chunk_size": 128, "headdim": width, "ngroups": self.groups, "seq_idx": self.sequence}
            return mamba_split_conv1d_scan_combined(by_length(zxbcdt), **x, **options)

        return gradients(function, self.inputs, self.weight)

    def ours(self, keep: bool = True) -> list[Tensor]:
        from snaketron.model.megatron.scan import Scan

        def function(zxbcdt: Tensor, **x: Tensor) -> Tensor:
            return Scan.apply(
                by_length(zxbcdt), *x.values(), self.sequence, 128, self.width, self.groups, keep
            )

        return gradients(function, self.inputs, self.weight)

    def exact(self) -> list[Tensor]:
        """By the scan that stands in on a CPU, in fp64."""
        options = {"chunk_size": 128, "headdim": self.width, "ngroups": self.groups, "seq_idx": self.sequence}
        return gradients(
            lambda **x: mamba2_layer.mamba_split_conv1d_scan_combined(**x, **options),
            {name: value.double() for name, value in self.inputs.items()},
            self.weight,
        )


def by_length(tensor: Tensor) -> Tensor:
    """(batch, length, ...) as it lies in memory in a model: the length first."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


SCAN = (2, 512, 8, 64, 2, 64)  # batch, length, heads, width of a head, groups, state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_scan_and_its_gradients_are_those_of_the_formula(dtype, packed):
    """Output and gradients of all inputs; mamba-ssm's function beside it."""
    case = ScanCase(dtype, packed, SCAN)
    exact, original, found = case.exact(), case.of_mamba_ssm(), case.ours()
    theirs, errors = ([relative(a, b) for a, b in zip(x, exact, strict=True)] for x in (original, found))
    print(dtype, "mamba-ssm", [f"{e:.1e}" for e in theirs], "ours", [f"{e:.1e}" for e in errors])
    assert max(theirs) < TOLERANCE[dtype]
    assert all(e < 1.1 * of_them + 1e-4 for e, of_them in zip(errors, theirs, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_scan_is_mamba_ssms_within_rounding(dtype):
    """Output and gradients, those of z, x, B and C, and dt each by itself: no large one hides a small one."""
    case = ScanCase(dtype, True, SCAN)
    inner = case.heads * case.width
    names = ["out", "z", "x", "B and C", "dt", *list(case.inputs)[1:]]

    def parts(out: Tensor, of_input: Tensor, *others: Tensor) -> list[Tensor]:
        both = of_input.shape[-1] - 2 * inner - case.heads
        return [out, *of_input.split([inner, inner, both, case.heads], -1), *others]

    found, original = parts(*case.ours()), parts(*case.of_mamba_ssm())
    errors = {n: relative(a, b.double()) for n, a, b in zip(names, found, original, strict=True)}
    print(dtype, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < (3e-3 if dtype == torch.float32 else 5e-3)


def test_the_scan_computes_the_same_bits_again_where_it_keeps_nothing():
    """Rows that end within a chunk, a width that is no power of two, and D for each of its numbers."""
    case = ScanCase(torch.bfloat16, True, (1, 500, 8, 40, 2, 32), wide_d=True)
    original, found, again = case.of_mamba_ssm(), case.ours(), case.ours(keep=False)
    names = ["out", *case.inputs]
    for name, a, b, c in zip(names, original, found, again, strict=True):
        assert relative(b, a.double()) < 5e-3, name
        assert torch.equal(b, c), name


# Largest relative errors of the convolution, whose sums over positions are in fp32.
CONVOLUTION = {torch.float32: 3e-6, torch.bfloat16: 2.5e-3}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", CONVOLUTION)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width"),
    [(1, 8192, 6144, 4), (2, 1021, 1000, 4), (3, 130, 40, 3), (2, 131, 37, 2), (2, 2, 64, 4)],
)
@pytest.mark.parametrize("order", [by_length, Tensor.contiguous])
def test_the_convolution_and_its_gradients_are_those_of_the_formula(
    order, batch, length, channels, width, dtype, packed
):
    """Its input is a part of wider rows, and so is the gradient, beside which nothing is written."""
    torch.manual_seed(0)
    rows = order(torch.randn(batch, length, channels + 40, device="cuda").to(dtype))
    grads = torch.full_like(rows, torch.nan)
    part = slice(8, 8 + channels)
    x, grad_x = rows[..., part], grads[..., part]
    weight = (0.5 * torch.randn(channels, width, device="cuda")).to(dtype)
    bias = torch.randn(channels, device="cuda").to(dtype)
    grad = order(torch.randn(batch, length, channels, device="cuda").to(dtype))
    sequence = None
    if packed:  # of 3 positions on average where rows are short, and of 50
        begins = torch.rand(batch, length, device="cuda") < (1 / 3 if length < 1000 else 1 / 50)
        sequence = begins.cumsum(1).int()
    out = scan_convolution.convolve(x, weight, bias, sequence)
    found = scan_convolution.convolve_back(x, weight, bias, grad, sequence, grad_x)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = F.silu(mamba2.convolve(*leaves, sequence))
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    errors = [relative(a, b) for a, b in zip((out, grad_x, *found), expected, strict=True)]
    print(dtype, [f"{e:.1e}" for e in errors])
    assert max(errors) < CONVOLUTION[dtype]
    assert out.stride(-1) == 1 and (out.stride(0) < out.stride(1)) == (x.stride(0) < x.stride(1))
    assert grads[..., :8].isnan().all() and grads[..., 8 + channels :].isnan().all()
    once = grad_x.clone()
    again = scan_convolution.convolve_back(x, weight, bias, grad, sequence, grad_x)
    assert all(torch.equal(a, b) for a, b in zip((once, *found), (grad_x, *again), strict=True))


def states_of_recurrence(
    x: Tensor, B: Tensor, C: Tensor, grad: Tensor, step: Tensor, decay: Tensor, sequence: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By positions: the states before chunks, and the gradients of those after chunks and of whole decays."""
    x, B, C, grad, step, decay = (t.double() for t in (x, B, C, grad, step, decay))
    B, C = (t.repeat_interleave(x.shape[2] // B.shape[2], 2) for t in (B, C))
    batch, length, heads, width = x.shape
    chunk, shift = decay.shape[-1], torch.zeros_like(decay[..., 0]).requires_grad_()
    own = decay.diff(dim=-1, prepend=torch.zeros_like(decay[..., :1])).exp().flatten(2)
    step, since_start = step.flatten(2), decay.exp().flatten(2)
    state = x.new_zeros(batch, heads, width, B.shape[-1])
    states, loss = [], x.new_zeros(())
    for t in range(length):
        before = sequence[:, max(t - 1, 0)]
        if t % chunk == 0:
            states.append(state)
            last = before
            state = state * shift[:, :, t // chunk, None, None].exp()
        kept = own[:, :, t] * (sequence[:, t] == before)[:, None]
        added = torch.einsum("bhp,bhn,bh->bhpn", x[:, t], B[:, t], step[:, :, t])
        state = state * kept[..., None, None] + added
        seen = since_start[:, :, t] * (sequence[:, t] == last)[:, None]
        loss = loss + torch.einsum("bhpn,bhn,bhp,bh->", states[-1], C[:, t], grad[:, t], seen)
    *of_states, of_decay = torch.autograd.grad(loss, [*states[1:], shift])
    of_states.append(torch.zeros_like(state))
    return torch.stack(states, 1).detach(), torch.stack(of_states, 1), of_decay


@pytest.mark.parametrize(("programs", "width", "state"), [(1, 64, 128), (128, 40, 100)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_states_and_their_gradients_are_those_of_the_recurrence(
    dtype, packed, programs, width, state, monkeypatch
):
    """Four chunks, the last of 44 positions; sequences that end within a chunk, and with one."""
    from snaketron.model.megatron import scan_states

    monkeypatch.setattr(scan_states, "PROGRAMS", programs)
    torch.manual_seed(0)
    batch, length, heads, groups, chunk = 2, 428, 4, 2, 128
    inner, both = heads * width, groups * state
    given = by_length(torch.randn(batch, length, inner + 2 * both, device="cuda").to(dtype))
    x, B, C = given.split([inner, both, both], -1)
    x, B, C = (
        x.unflatten(-1, (heads, width)),
        B.unflatten(-1, (groups, state)),
        C.unflatten(-1, (groups, state)),
    )
    grad = by_length(torch.randn(batch, length, heads, width, device="cuda").to(dtype))
    step = torch.rand(batch, heads, -(-length // chunk), chunk, device="cuda")
    step.flatten(2)[:, :, length:] = 0
    decay = (-0.02 * step).cumsum(-1)
    sequence = torch.zeros(batch, length, dtype=torch.int32, device="cuda")
    if packed:
        sequence[0, 150:], sequence[0, 400:], sequence[1, 256:] = 1, 2, 1

    def compute() -> list[Tensor]:
        numbers = sequence if packed else None
        found = scan_states.states(x, B, step, decay, numbers)
        return [found, *scan_states.states_back(grad, C, decay, found, numbers)]

    found, exact = compute(), states_of_recurrence(x, B, C, grad, step, decay, sequence)
    errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    print(dtype, [f"{e:.1e}" for e in errors])
    assert max(errors) < (3e-3 if dtype == torch.float32 else 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(found, compute(), strict=True))


@pytest.mark.parametrize(
    ("heads", "rows", "columns", "part"),
    [
        (128, 64, 128, (64, 64)),  # 256 programs
        (64, 64, 128, (64, 64)),  # 128
        (63, 64, 128, (64, 32)),  # 252, not 126
        (8, 64, 128, (64, 16)),  # 64: a product of matrices has 16 columns or more
        (200, 24, 40, (32, 64)),  # no larger than the state; 200
        (200, 8, 10, (16, 16)),
    ],
)
def test_a_program_has_less_of_a_state_where_there_are_few_heads(heads, rows, columns, part, monkeypatch):
    from snaketron.model.megatron import scan_states

    monkeypatch.setattr(scan_states, "PROGRAMS", 128)
    assert scan_states.tile((64, 64), rows, columns, heads) == part
