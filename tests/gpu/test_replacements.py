"""Whether megatron-core still needs the replacements that only a GPU can judge; see the unit test."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import gpu, originals

import pytest
import torch

TESTED = {
    "RMSNorm of widths without a kernel",
    "mamba-ssm's language models",
    "the cross entropy",
    "the gradient of residual connections",
    "the gradients of several depths in fp8",
}

pytestmark = pytest.mark.usefixtures("one_process")


def test_the_original_cross_entropy_leaves_the_logits_as_they_are():
    """So the gradient is in other memory."""
    from megatron.core import parallel_state

    name = "megatron.core.models.common.language_module.language_module:te_parallel_cross_entropy"
    group = parallel_state.get_tensor_model_parallel_group()
    labels = torch.zeros(8, 1, dtype=torch.int64, device="cuda")

    def unchanged(function: Any) -> bool:
        """Whether the logits are the same after the backward pass."""
        logits = torch.randn(8, 1, 64, device="cuda", requires_grad=True)
        before = logits.detach().clone()
        function(logits, labels, group, False).sum().backward()
        return torch.equal(logits.detach(), before)

    assert unchanged(originals.original(name)), "this row of `replacements.TABLE` can go"
    assert not unchanged(originals.current(name))


@pytest.mark.parametrize("corrected", [False, True])
def test_a_layer_of_two_depths_loses_the_gradient_of_the_second(corrected: bool):
    """A layer that both depths call, with inputs of 1 and of 2: the gradient sums 16 of each."""
    from snaketron.model.megatron import corrections

    from megatron.core.extensions.transformer_engine import TELinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=True,
    )
    layer = TELinear(
        16,
        16,
        parallel_mode="duplicated",
        config=config,
        init_method=torch.nn.init.ones_,
        bias=False,
        skip_bias_add=False,
        skip_weight_param_allocation=False,
        is_expert=False,
    ).cuda()
    if corrected:
        corrections.add_depths(layer)
    layer.weight.main_grad = torch.zeros(16, 16, device="cuda")
    layer.is_first_microbatch = True  # as megatron-core sets it in a step under fp8
    for_depths = [torch.full((16, 16), value, device="cuda").bfloat16() for value in (1.0, 2.0)]
    sum(layer(x)[0].sum() for x in for_depths).backward()
    found = layer.weight.main_grad.unique().tolist()
    assert found == ([48.0] if corrected else [16.0]), "this row of `replacements.TABLE` can go"


def test_transformer_engine_has_kernels_for_these_widths_and_none_for_nanos():
    """By the names of what the original launches: `tuned` or `general`, forwards and backwards."""
    from transformer_engine.pytorch.constants import TE_DType

    forward, backward = originals.original(gpu.NORM_FORWARD), originals.original(gpu.NORM_BACKWARD)

    def launched(width: int) -> set[str]:
        x = torch.randn(64, width, device="cuda").bfloat16()
        weight = torch.ones(width, device="cuda").bfloat16()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out, _, rstd = forward(x, weight, 1e-5, None, None, TE_DType[x.dtype], 0, False)
            backward(out, x, rstd, weight, 0, False)
            torch.cuda.synchronize()
        names = " ".join(event.name for event in profile.events() if "rmsnorm" in event.name)
        assert "rmsnorm_fwd" in names and "rmsnorm_bwd" in names, names
        return set(re.findall("rmsnorm_..d_(tuned|general)", names))

    for width in gpu.TUNED_WIDTHS:
        assert launched(width) == {"tuned"}, f"{width} can leave `gpu.TUNED_WIDTHS`"
    assert launched(2688) == {"general"}, "this row of `replacements.TABLE` can go"


@pytest.mark.parametrize("width", [2688, 4096])
@pytest.mark.parametrize("fused", [True, False])
def test_a_norm_adds_the_gradient_that_goes_past_its_layer(fused: bool, width: int):
    """By the additions that the backward pass of a layer launches: one, and with ours none."""
    from snaketron.model.megatron import residuals

    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    kind = {"params_dtype": torch.bfloat16}
    if fused:
        norm, product = None, te.LayerNormLinear(width, width, bias=False, normalization="RMSNorm", **kind)
        weight = product.layer_norm_weight
    else:
        norm, product = te.RMSNorm(width, **kind), te.Linear(width, width, bias=False, **kind)
        weight = norm.weight
    x, grad = (torch.randn(512, 1, width, device="cuda").bfloat16() for _ in range(2))

    def backward(*, ours: bool) -> tuple[int, torch.Tensor]:
        given = x.clone().requires_grad_()
        product.weight.grad = weight.grad = None  # so that theirs are not added to others
        entered = residuals.enter(given, norm, product) if ours else given
        y = product(entered if norm is None else norm(entered))
        out = originals.current(residuals.ADD)(True)((y, None), entered, 0.0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out.backward(grad)
            torch.cuda.synchronize()
        return sum("CUDAFunctor_add" in event.name for event in profile.events()), given.grad

    backward(ours=True)  # compiles the kernels
    (additions, theirs), (none, found) = backward(ours=False), backward(ours=True)
    assert additions == 1, "this row of `replacements.TABLE` can go"
    assert none == 0
    exact = x.double().requires_grad_()
    normal = torch.nn.functional.rms_norm(exact, [width], weight.double(), 1e-5)
    (exact + normal @ product.weight.double().T).backward(grad.double())
    errors = [float((a - exact.grad).norm() / exact.grad.norm()) for a in (found, theirs)]
    assert errors[0] < 4e-3 and errors[0] <= errors[1]  # ours rounds once


def test_importing_mamba_ssm_imports_its_language_models():
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec and spec.origin
    text = Path(spec.origin).read_text(encoding="utf-8")
    assert "from mamba_ssm.models.mixer_seq_simple import" in text, "this row of `replacements.TABLE` can go"
