"""What a model that megatron-core has built is given in the place of values that are wrong for it."""

from __future__ import annotations

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock


def correct(model: HybridModel, config: TransformerConfig) -> None:
    """Correct this rank's part of a model, before it is wrapped and has an optimizer."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            count_in_integers(module)
        if isinstance(module, MambaMixer):
            set_epsilon(module, config)
        if isinstance(module, MultiTokenPredictionBlock):
            add_depths(module)
            share_balance(module)
        if isinstance(module, HybridStack):
            let_each_layer_mark(module)
    mark_experts(model)


def count_in_integers(router: TopKRouter) -> None:
    """Count the tokens of each expert in int64: `Float16Module` would make the count bf16."""
    router.local_tokens_per_expert = router.local_tokens_per_expert.long()


def set_epsilon(mixer: MambaMixer, config: TransformerConfig) -> None:
    """Give the gated norm of a Mamba-2 layer the epsilon of the model."""
    mixer.norm.eps = config.layernorm_epsilon


def mark_experts(model: HybridModel) -> None:
    """Mark the parameters of routed experts, which gives them an optimizer of their own, with EP = 1 too."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def add_depths(block: MultiTokenPredictionBlock) -> None:
    """Let Transformer Engine's layers add the gradients of all depths, which share their weights.

    Their first call of a step under fp8 writes its gradient, after those of later depths were computed.
    """
    for module in block.modules():
        if hasattr(module, "disable_parameter_transpose_cache"):
            module.disable_parameter_transpose_cache = True


def let_each_layer_mark(stack: HybridStack) -> None:
    """Let the recording of any layer set the mark that says whether fp8 weights are rounded anew.

    The first layer alone sets it otherwise, and where that is one of experts, or dense, it has no recording.
    """
    for layer in stack.layers:
        layer.is_first_layer = True


def share_balance(block: MultiTokenPredictionBlock) -> None:
    """Divide the load balancing losses of multi-token prediction among the depths, which share its layers.

    The routers do so themselves where they know what they are a part of. They would note their loss at a
    place that there may not be: of their numbers only the first is certain to have one.
    """
    for module in block.modules():
        if isinstance(module, TopKRouter):
            module.is_mtp_layer, module.layer_number = True, 1
