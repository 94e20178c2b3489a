"""The stand-ins for GPU-only pieces against formulas and against torch."""

import os
import subprocess
import sys

from snaketron.config import Model, Optimizer
from snaketron.log import UserError
from snaketron.model import backend
from snaketron.model.megatron import mamba2
from snaketron.settings.training import RunSettings
from tests.conftest import REPOSITORY

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
    return mamba2.mamba_split_conv1d_scan_combined(
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
                start, states = t, torch.zeros(HEADS, HEAD_DIM, STATE_DIM, dtype=z.dtype)
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
def test_gradients_of_the_convolution_are_those_of_finite_differences(seq_idx):
    x, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 6, 3), (3, 4), (3,))
    )
    assert torch.autograd.gradcheck(lambda *a: mamba2.causal_conv1d(*a, seq_idx), (x, weight, bias))


def test_convolution_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)
    weight, bias = torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    y = mamba2.causal_conv1d(x, weight, bias, torch.tensor([[0, 0, 1, 1]]))
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


def test_adam_is_that_of_torch_also_when_resumed():
    from snaketron.model.megatron.cpu import FusedAdam

    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    adam, adamw = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(6):
        if step == 3:
            saved, adam = adam.state_dict(), FusedAdam(ours, **settings)
            adam.load_state_dict(saved)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        adam.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_cuda_means_cpu_to_megatron_and_to_nobody_else():
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.cuda.current_device() == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_packages_of_the_gpu_are_left_alone_on_a_machine_without_one(tmp_path):
    """A login node has the environment of the GPU nodes."""
    for package in ("transformer_engine", "mamba_ssm", "causal_conv1d"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise OSError('libcuda.so.1 is not there')")
    code = "from snaketron.model import spec; print(spec.transformer_config.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'scripts'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "transformer_config\n", done.stderr


def test_what_needs_a_gpu_is_refused_without_one():
    model = Model(precision="nvfp4")
    run = RunSettings(tracking="off", offload_optimizer=0.5, recompute=["layernorm"], cuda_graphs=True)
    with pytest.raises(UserError) as refused:
        backend.check(model, Optimizer(moment_precision="bf16"), run)
    assert str(refused.value).splitlines() == [
        f"{key} needs a GPU, and this machine has none"
        for key in (
            "model.precision: nvfp4",
            "optimizer.moment_precision: bf16",
            "cuda_graphs: True",
            "offload_optimizer: 0.5",
            "recompute: layernorm",
        )
    ]
    backend.check(Model(precision="bf16"), Optimizer(gradient_precision="bf16"), RunSettings(tracking="off"))


def test_adam_of_a_group_without_parameters_does_nothing():
    """A pipeline stage may have no routed experts, which have a group of their own."""
    if backend.HAS_GPU:
        pytest.skip("of the CPU")
    from snaketron.model.megatron.cpu import FusedAdam

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    adam = FusedAdam(
        [{"params": [weight]}, {"params": []}], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    adam.step()
    assert torch.allclose(weight, torch.full((2,), 0.9))
