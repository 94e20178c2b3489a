"""What a GPU adds to megatron-core: switches of its kernels, and pieces that do not wait for the host.

Imported by `backend` before megatron-core, and only on a machine with a GPU; `replacements` says what each
function stands for.
"""

from __future__ import annotations

import os
import types
from typing import Any

from snaketron.model.megatron import gradients
from snaketron.model.megatron.originals import original

import torch

# Read by libraries when they are imported or first used; what the user sets holds.
ENVIRONMENT = {
    # Triton keeps what its autotuner found beside the compiled kernels.
    "TRITON_CACHE_AUTOTUNING": "1",
}

TRANSFORMER_CONFIG = {
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "use_fused_weighted_squared_relu": True,
    # Transformer Engine's: the native one keeps fp32 copies of the logits, and rounds their gradient to bf16
    # in an fp32 model too.
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
    "gradient_accumulation_fusion": True,
}
# TransformerConfig fields for padded batches: the fused load balancing loss wants the number of tokens as an
# integer, and megatron-core gives it what is left of the padding mask.
PACKED = {"moe_router_fusion": False}
# TransformerConfig fields that record attention and Mamba layers. Not the router (moe_router,
# moe_preprocess): a recorded one counts the tokens of a validation for the load of experts too, and after a
# validation before the first step it read memory that was gone.
CUDA_GRAPHS = {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn", "mamba"]}


def _accumulate_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T inputs in one kernel, whatever the type of main_grad, or = if it is new."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        inputs,
        grad_output,
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=not gradients.is_new(main_grad),
        use_split_accumulator=True,
        grad=True,
    )


def set_environment() -> None:
    """Set what libraries read when they are imported or first used."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def fused_gradients() -> types.ModuleType:
    """The module of APEX that adds gradients of weights, with Transformer Engine's product."""
    module: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = _accumulate_gradient
    return module


# What the functions below call for what they leave to megatron-core.
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher."
MAKE_HOOK = "megatron.core.distributed:DistributedDataParallel._make_backward_post_hook"
EMBEDDING = "megatron.core.tensor_parallel.layers:VocabParallelEmbedding.forward"
PLACEHOLDER = "megatron.core.tensor_parallel.layers:get_dummy_wgrad"
EXPERTS_FORWARD = "megatron.core.transformer.moe.experts:TEGroupedMLP.forward"
TO_HOST = _DISPATCHER + "_maybe_dtoh_and_synchronize"
DISPATCH_POSTPROCESS = _DISPATCHER + "dispatch_postprocess"
COMBINE_PREPROCESS = _DISPATCHER + "combine_preprocess"
NORM_FORWARD = "transformer_engine.pytorch.cpp_extensions:rmsnorm_fwd"
NORM_BACKWARD = "transformer_engine_torch:rmsnorm_bwd"

# Widths that Transformer Engine has RMSNorm kernels for, forwards and backwards: those that it registers as
# "tuned" in transformer_engine/common/normalization/rmsnorm/. tests/gpu asks the installed release.
TUNED_WIDTHS = (512, 768, 1024, 2048, 4096, 8192)


class _Rounding:
    """Whether the recordings of layers round their weights to fp8 anew; None before the first one starts."""

    anew: bool | None = None


def _round_anew(_recording: Any, anew: bool | None) -> None:
    _Rounding.anew = anew


# What each recording takes for its own note of it; all recordings read one mark on the GPU.
WEIGHTS_ROUNDED = property(lambda _recording: _Rounding.anew, _round_anew)


def experts_forward(
    self: Any, x: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor, **kwargs: Any
) -> Any:
    """The output of the routed experts, and no bias."""
    out = _our_experts(self, x, tokens_per_expert, probs)
    if out is None:
        return original(EXPERTS_FORWARD)(self, x, tokens_per_expert, probs, **kwargs)
    return out, None


class _Sums:
    """Whether processes sum gradients during the backward pass: then hooks want to see those of autograd."""

    early = False


def embedding_forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings (..., width) of tokens; their gradient is added to `main_grad` in the backward pass."""
    trained = torch.is_grad_enabled() and self.weight.requires_grad and hasattr(self.weight, "main_grad")
    here = self.tp_group.size() == 1 and not self.reduce_scatter_embeddings
    if _Sums.early or not trained or not here:
        return original(EMBEDDING)(self, ids)
    from snaketron.model.megatron.embedding import Embedding

    return Embedding.apply(ids, self.weight)


def placeholder(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor | None:
    """What autograd gets as the gradient of a weight that is in `main_grad` already: nothing where it can be.

    A weight that is used twice, as that of the output layer is by multi-token prediction, would have the sum
    of two placeholders.
    """
    if _Sums.early or zero:
        return original(PLACEHOLDER)(shape, dtype, zero)
    return None


def make_backward_post_hook(self: Any, first: Any) -> Any:
    """Autograd reports only the first weight of a layer of experts; this hook reports the others.

    In a recording small gradients are added together (`gradients.together`), and nothing is reported.
    """
    hook = original(MAKE_HOOK)(self, first)
    _Sums.early = self.ddp_config.overlap_grad_reduce

    def all_of_layer(*args: Any) -> None:
        if gradients.waits(first):
            return
        hook(*args)
        if self.ddp_config.overlap_grad_reduce and first.__dict__.pop("others_added", False):
            for other in first.others:
                group = self.param_to_bucket_group[other]
                group.register_grad_ready(other, self.force_all_reduce)

    return all_of_layer


def _alone(dispatcher: Any) -> bool:
    """Whether all experts are on this GPU."""
    return dispatcher.ep_size == dispatcher.tp_size == 1


def maybe_dtoh_and_synchronize(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Take the numbers to the host, unless all experts are on this GPU: then nothing needs them there."""
    return tokens_per_expert if _alone(self) else original(TO_HOST)(self, point, tokens_per_expert)


def dispatch_postprocess(self: Any, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
    """The tokens sorted by expert, and how many each has, on the GPU."""
    if _alone(self):  # they are sorted by expert already
        numbers, self.tokens_per_expert = self.tokens_per_expert, None
        return tokens, numbers, probs
    tokens, numbers, probs = original(DISPATCH_POSTPROCESS)(self, tokens, probs)
    if self.num_local_experts > 1:
        numbers = self.num_global_tokens_per_local_expert.sum(0)  # which is on the GPU
    return tokens, numbers, probs


def combine_preprocess(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The experts' output (tokens, width), sorted for its way back where it has one."""
    return hidden_states if _alone(self) else original(COMBINE_PREPROCESS)(self, hidden_states)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: Any, *_: Any) -> torch.Tensor:
    """The loss of each token (length, batch); the gradient takes the place of the logits.

    Transformer Engine computes it where ranks share the vocabulary: they know the largest logit and the sum
    of a token only after they have exchanged them.
    """
    from snaketron.model.megatron import loss, packed

    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    expected = packed.Expected.take()
    if group.size() == 1:
        return loss.cross_entropy(logits, labels, None if expected is None else expected.transpose(0, 1))
    return parallel_cross_entropy(logits, labels, dist_process_group=group, overwrite_input=True)


def no_acceptance_counts(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """No counts; `cross_entropy` has put the gradient in the place of the logits that they are of."""
    return logits.new_zeros(()), logits.new_zeros(())


def _scan(self: Any, zxbcdt: torch.Tensor, packed: Any = None) -> torch.Tensor:
    """Convolution, scan and gate of a Mamba layer, (length, batch, ...).

    The kernels read their input, and write its gradient, where it is. megatron-core copies both into the
    order (batch, length), which takes 19 ms of a step of 32k tokens on an H200.
    """
    from snaketron.model.megatron import norms

    split, zxbcdt = self.cp, zxbcdt.transpose(0, 1)
    heads = split.get_D().float().view(-1, self.headdim) if self.D_has_hdim else split.get_D()
    parameters = (
        split.get_conv1d_weight().squeeze(1),
        split.get_conv1d_bias(),
        split.get_dt_bias().float(),
        -torch.exp(split.get_A_log().float()),
        heads,
    )
    y = _scan_of(self, zxbcdt, parameters, packed.seq_idx if packed is not None else None)
    y = split.post_conv_ssm(y.transpose(0, 1).contiguous(), packed)
    if not self.rmsnorm:
        return y
    norm = self.norm
    return norms.GroupedNorm.apply(y, norm.weight, norm.eps, norm.group_size or norm.weight.numel())


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> Any:
    """RMSNorm in the form that `quantizer` makes, None, and 1 / sqrt(mean of a row's squares + eps).

    With one scale for a tensor or for a block, Transformer Engine too rounds the norm to fp8 in a step of its
    own. It computes what has other forms, and what leaves processors free (`sm_margin`).
    """
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    rounded_after = (type(None), Float8BlockQuantizer, Float8CurrentScalingQuantizer)
    as_usual = out is None and isinstance(quantizer, rounded_after) and TE_DType[x.dtype] == dtype
    tuned = x.shape[-1] in TUNED_WIDTHS
    if not as_usual or sm_margin or zero_centered or tuned or not _fits(x, weight):
        return original(NORM_FORWARD)(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered)
    from snaketron.model.megatron import norms

    normal, rstd = norms.norm(x, weight, eps, x.shape[-1])
    return normal if quantizer is None else quantizer(normal), None, rstd


def rmsnorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> Any:
    """The gradients of x and of the weight; that of a frozen parameter, which no one reads, is 0.

    That of x has the gradient added that comes to it past the layer, if it waits (`residuals`).
    """
    from snaketron.model.megatron import norms, residuals

    ours = not sm_margin and not zero_centered and _fits(x, weight) and grad.dtype == weight.dtype
    added = residuals.take(weight, x, grad) if ours else None
    if not ours or (added is None and x.shape[-1] in TUNED_WIDTHS):
        return original(NORM_BACKWARD)(grad, x, rstd, weight, sm_margin, zero_centered)

    # Transformer Engine's modules hand over the parameter, a view of it, or a copy in another type.
    owner = weight if weight._base is None else weight._base
    trained = owner.requires_grad or not isinstance(owner, torch.nn.Parameter)
    found, total = norms.norm_back(x, weight, rstd, grad, x.shape[-1], trained=trained, added=added)
    return found, torch.zeros_like(weight) if total is None else total


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a row fits in a program of `norms`, and is of the weight's type."""
    from snaketron.model.megatron import norms

    return x.shape[-1] <= norms.WIDEST and x.dtype == weight.dtype


def _scan_of(self: Any, zxbcdt: torch.Tensor, parameters: Any, sequence: Any) -> torch.Tensor:
    """Convolution, scan and gate, (batch, length, ...); mamba-ssm's function copies widths that are odd."""
    groups = self.cp.ngroups_local_tpcp
    if zxbcdt.shape[-1] % 8:  # the kernels would read its rows two bytes at a time
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        return mamba_split_conv1d_scan_combined(
            zxbcdt.contiguous(),
            *parameters,
            chunk_size=self.chunk_size,
            activation="silu",
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=groups,
            norm_before_gate=self.norm_before_gate,
            seq_idx=sequence,
        )
    from snaketron.model.megatron.scan import Scan

    keeps = getattr(self.config, "keeps_scan", False)
    return Scan.apply(zxbcdt, *parameters, sequence, self.chunk_size, self.headdim, groups, keeps)


def _our_experts(
    module: Any, x: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
) -> torch.Tensor | None:
    """The output of the experts, or None where Transformer Engine must compute it.

    That is in nvfp4, in fp32, and before the weights are in one buffer. Under fp8 they compute in e4m3 with a
    scale for each token and output, whatever the recipe of the other layers: on an H200
    (docs/measurements.md) Transformer Engine's fp8 ones made the whole step take 2.2 times as long.

    Nor may it compute no tokens: its layers, which are not called otherwise, would take any micro-batch for
    the first one and write over the gradients, and under delayed scaling have maxima that others lack.
    """
    from snaketron.model.megatron.experts import Experts, frozen_experts, stacked

    config, layers = module.config, (module.linear_fc1, module.linear_fc2)
    if config.fp4 or x.dtype != torch.bfloat16:
        return None
    frozen = not layers[0].weight0.requires_grad  # under LoRA, which has stacked them
    if not hasattr(module, "_stacked"):
        parameters = [_weights(layer) for layer in layers]
        tensors = [stacked(p) for p in parameters]
        if hasattr(parameters[0][0], "main_grad"):
            tensors += [stacked([p.main_grad for p in ps]) for ps in parameters]
        elif not frozen:
            tensors += [None, None]
        module._stacked = None if any(t is None for t in tensors) else (tensors[:2], tensors[2:])
    if module._stacked is None:
        return None
    ends = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0).int()
    if frozen:
        adapters = [getattr(layer, "lora", None) for layer in layers]
        return frozen_experts(x, probs.unsqueeze(-1), ends, module._stacked[0], adapters)
    first = (layers[0].weight0, layers[1].weight0)
    return Experts.apply(x, probs.unsqueeze(-1), ends, *first, *module._stacked, _rounded(module))


def _rounded(module: Any) -> tuple[Any, Any] | None:
    """The weights of a layer of experts in fp8, rounded in the first micro-batch of a step; None in bf16.

    In bf16 too where the layer is one of those that stay in it, or the width is none that fp8 takes.
    """
    from snaketron.model.megatron import experts8

    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    stacks = module._stacked[0]
    if not FP8GlobalStateManager.is_fp8_enabled() or not all(experts8.fits(w) for w in stacks):
        return None
    if not hasattr(module, "_in_fp8"):
        module._in_fp8 = tuple(experts8.empty(w) for w in stacks)
        module.linear_fc1.is_first_microbatch = True
    if module.linear_fc1.is_first_microbatch:
        for weights, rounded in zip(stacks, module._in_fp8, strict=True):
            experts8.round_weights(weights, rounded)
    module.linear_fc1.is_first_microbatch = False
    return module._in_fp8


def _weights(layer: Any) -> list[Any]:
    return [getattr(layer, f"weight{i}") for i in range(layer.num_gemms)]


def prepare_model(model: torch.nn.Module) -> None:
    """Register the experts of a new model from the last to the first.

    DistributedDataParallel lays parameters out in memory the other way round, and our experts want the first
    one first.
    """
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    for module in model.modules():
        if isinstance(module, TEGroupedMLP):
            for layer in (module.linear_fc1, module.linear_fc2):
                for i in reversed(range(layer.num_gemms)):
                    layer._parameters[f"weight{i}"] = layer._parameters.pop(f"weight{i}")
                layer.weight0.others = _weights(layer)[1:]
