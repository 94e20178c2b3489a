"""What a GPU adds to megatron-core 0.19.2: switches of its kernels, and a function that APEX would have.

Imported by `backend` before megatron-core, and only on a machine with a GPU.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

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
    """main_grad += grad_output^T inputs, in one kernel, whatever the type of main_grad."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        inputs,
        grad_output,
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=True,
        use_split_accumulator=True,
        grad=True,
    )


def prepare() -> None:
    """Set the environment, and give megatron-core the one function that it would take from APEX."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    module: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = _accumulate_gradient
    sys.modules.setdefault(module.__name__, module)


def patch() -> None:
    """Put our experts and our step of the optimizer under megatron-core's, after its import; see `experts`
    and `adam`."""
    from snaketron.model.megatron import adam

    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.language_module import language_module
    from megatron.core.ssm.mamba_mixer import MambaMixer
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.transformer.moe import experts as theirs
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    make_hook = DistributedDataParallel._make_backward_post_hook
    mlp_forward = theirs.TEGroupedMLP.forward
    dispatch_postprocess, combine_preprocess = Dispatcher.dispatch_postprocess, Dispatcher.combine_preprocess
    to_host = Dispatcher._maybe_dtoh_and_synchronize

    def forward(
        self: Any, x: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor, **kwargs: Any
    ) -> Any:
        ours = _our_experts(self, x, tokens_per_expert, probs)
        return mlp_forward(self, x, tokens_per_expert, probs, **kwargs) if ours is None else (ours, None)

    def _make_backward_post_hook(self: Any, first: Any) -> Any:
        """When our experts have added the gradients of a layer, autograd tells it of the first one alone."""
        hook = make_hook(self, first)

        def all_of_layer(*args: Any) -> None:
            hook(*args)
            if self.ddp_config.overlap_grad_reduce and first.__dict__.pop("others_added", False):
                for other in first.others:
                    group = self.param_to_bucket_group[other]
                    group.register_grad_ready(other, self.force_all_reduce)

        return all_of_layer

    def alone(self: Any) -> bool:
        return self.ep_size == self.tp_size == 1

    def _maybe_dtoh_and_synchronize(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        # With all experts on this GPU nothing else needs the numbers on the host.
        return tokens_per_expert if alone(self) else to_host(self, point, tokens_per_expert)

    def _dispatch_postprocess(self: Any, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        if alone(self):  # they are sorted by expert already
            numbers, self.tokens_per_expert = self.tokens_per_expert, None
            return tokens, numbers, probs
        tokens, numbers, probs = dispatch_postprocess(self, tokens, probs)
        if self.num_local_experts > 1:
            numbers = self.num_global_tokens_per_local_expert.sum(0)  # which is on the GPU
        return tokens, numbers, probs

    def _combine_preprocess(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if alone(self) else combine_preprocess(self, hidden_states)

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: Any, *_: Any) -> torch.Tensor:
        return parallel_cross_entropy(logits, labels, dist_process_group=group, overwrite_input=True)

    adam.patch()
    # The gradient takes the place of the logits, of which theirs keeps a copy (4 GiB at 16k tokens).
    language_module.te_parallel_cross_entropy = cross_entropy
    # A metric that we do not report, by one more pass over the logits of each depth.
    multi_token_prediction._compute_mtp_acceptance_counts = lambda logits, *_: (logits.new_zeros(()),) * 2
    DistributedDataParallel._make_backward_post_hook = _make_backward_post_hook
    MambaMixer._ssm_training = _scan
    theirs.TEGroupedMLP.forward = forward
    Dispatcher._maybe_dtoh_and_synchronize = _maybe_dtoh_and_synchronize
    Dispatcher.dispatch_postprocess = _dispatch_postprocess
    Dispatcher.combine_preprocess = _combine_preprocess


def _scan(self: Any, zxbcdt: torch.Tensor, packed: Any = None) -> torch.Tensor:
    """Convolution, scan and gate of a Mamba layer, (length, batch, ...).

    As theirs, but the kernels read their input, and write its gradient, where it is: theirs copies both
    into the order (batch, length), 19 ms of a step of 32k tokens on an H200.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    split, zxbcdt = self.cp, zxbcdt.transpose(0, 1)
    if zxbcdt.shape[-1] % 8:  # which the convolution's strides must be multiples of
        zxbcdt = zxbcdt.contiguous()
    heads = split.get_D().float().view(-1, self.headdim) if self.D_has_hdim else split.get_D()
    y = mamba_split_conv1d_scan_combined(
        zxbcdt,
        split.get_conv1d_weight().squeeze(1),
        split.get_conv1d_bias(),
        split.get_dt_bias().float(),
        -torch.exp(split.get_A_log().float()),
        D=heads,
        chunk_size=self.chunk_size,
        activation=self.activation,
        headdim=None if self.D_has_hdim else self.headdim,
        ngroups=split.ngroups_local_tpcp,
        norm_before_gate=self.norm_before_gate,
        seq_idx=packed.seq_idx if packed is not None else None,
    )
    y = split.post_conv_ssm(y.transpose(0, 1).contiguous(), packed)
    return self.norm(y) if self.rmsnorm else y


def _our_experts(
    module: Any, x: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
) -> torch.Tensor | None:
    """The output of the experts, or None where Transformer Engine must compute it: in nvfp4, in fp32, or
    before the weights are in one buffer.

    Under fp8 too the experts compute in bf16: on an H200 (docs/measurements.md) Transformer Engine's fp8 ones
    made the whole step take 2.2 times as long.
    """
    from snaketron.model.megatron.experts import Experts, frozen_experts, stacked

    config, layers = module.config, (module.linear_fc1, module.linear_fc2)
    if config.fp4 or x.dtype != torch.bfloat16 or not len(x):
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
    return Experts.apply(x, probs.unsqueeze(-1), ends, *first, *module._stacked)


def _weights(layer: Any) -> list[Any]:
    return [getattr(layer, f"weight{i}") for i in range(layer.num_gemms)]


def prepare_model(model: torch.nn.Module) -> None:
    """Register the experts of a new model from the last to the first: DistributedDataParallel lays parameters
    out in memory the other way round, and our experts want the first one first."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    for module in model.modules():
        if isinstance(module, TEGroupedMLP):
            for layer in (module.linear_fc1, module.linear_fc2):
                for i in reversed(range(layer.num_gemms)):
                    layer._parameters[f"weight{i}"] = layer._parameters.pop(f"weight{i}")
                layer.weight0.others = _weights(layer)[1:]
