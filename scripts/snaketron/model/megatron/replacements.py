"""Everything that replaces or corrects a piece of megatron-core: one table, which is applied by `apply`.

The rows for machines without a GPU are in `replacements_cpu`. A row goes when its test in
tests/unit/model/megatron/test_replacements*.py (tests/gpu for what only a GPU can judge) says that the
installed release does not need it any more: the test runs the original piece and shows its fault.
"""

from __future__ import annotations

import sys
from typing import Any

from snaketron.model.megatron import originals, replacements_cpu
from snaketron.model.megatron.row import NONE_FOUND, Machine, Replacement, stand_in

_PULL = "https://github.com/NVIDIA/Megatron-LM/pull/"

_MTP = "megatron.core.transformer.multi_token_prediction:"
_MODEL = "megatron.core.models.hybrid.hybrid_model:"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."
_MOE = "megatron.core.transformer.moe."
_DISPATCHER = _MOE + "token_dispatcher:MoEAlltoAllTokenDispatcher."
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer:"
_LAYERS = "megatron.core.tensor_parallel.layers:"
_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer."
_MIXER = "megatron.core.ssm.mamba_mixer:"
_TE_NORM = "transformer_engine.pytorch.ops.basic.rmsnorm:"

TABLE = (
    Replacement(
        "the count of tokens for the experts' bias",
        "all",
        why="the original combines (tokens, experts) with (tokens,) and fails for every padded batch",
        upstream=_PULL + "6114 (merged 2026-07, issue 6111)",
        until="the first release that has the pull request; 0.19.2 has not",
        pieces={_MOE + "router:TopKRouter._apply_expert_bias": "padding.apply_expert_bias"},
    ),
    Replacement(
        "the weight of the load balancing loss",
        "all",
        why="ranks that share a padded sequence weigh the loss by their own tokens without padding, so the "
        "gradient of a token depends on how much padding its rank has",
        upstream="https://github.com/NVIDIA/Megatron-LM/issues/1652 (open); " + _PULL + "5047, in 0.19.2, is "
        "right where no rank has padding",
        until="the original weighs it by the tokens of all these ranks",
        pieces={_MOE + "router:get_tokens_per_expert_and_token_count": "padding.count_tokens"},
    ),
    Replacement(
        "the type of the count of tokens",
        "all",
        why="Float16Module makes the count bf16, which is exact only up to 256 tokens",
        upstream=NONE_FOUND,
        until="Float16Module leaves the count as it is, or it is an integer",
        in_objects={_MOE + "router:TopKRouter.__init__": "corrections.count_in_integers"},
    ),
    Replacement(
        "the epsilon of Mamba's gated norm",
        "all",
        why="the original is 1e-5, whatever layernorm_epsilon is",
        upstream=NONE_FOUND,
        until="the mixer takes layernorm_epsilon",
        in_objects={_MIXER + "MambaMixer.__init__": "corrections.set_epsilon"},
    ),
    Replacement(
        "the mark of experts in one group",
        "all",
        why="with EP = 1 the original gives experts no optimizer of their own: layouts' checkpoints differ",
        upstream=NONE_FOUND,
        until="experts have an optimizer of their own with EP = 1 too",
        in_objects={_MOE + "moe_layer:MoELayer.__init__": "corrections.mark_experts"},
    ),
    Replacement(
        "the gradients of several depths in fp8",
        "all",
        why="in the first micro-batch of a step the original's layers of multi-token prediction write the "
        "gradient of the first depth over those of the others",
        upstream=NONE_FOUND,
        until="Transformer Engine's layers tell the rounding of weights from the writing of gradients",
        in_objects={_MTP + "MultiTokenPredictionBlock.__init__": "corrections.add_depths"},
    ),
    Replacement(
        "the first of the recorded layers",
        "all",
        why="the original lets the recording of a stack's first layer say whether fp8 weights are rounded "
        "anew. A layer of experts or a dense one has no recording. Multi-token prediction, whose stack may "
        "begin with attention, then says for all that they are not, and the decoder's stay as they were",
        upstream=NONE_FOUND,
        until="the first recording of a step says it, whatever its layer",
        in_objects={
            "megatron.core.models.hybrid.hybrid_block:annotate_first_last_layer": (
                "corrections.let_each_layer_mark"
            )
        },
    ),
    Replacement(
        "the load balancing loss of several depths",
        "all",
        why="HybridStack does not tell its routers that they are part of multi-token prediction, so each "
        "depth adds the whole loss of the layers that the depths share",
        upstream=_PULL + "6748 (merged 2026-08)",
        until="the first release that has the pull request; 0.19.2 has not",
        in_objects={
            "megatron.core.models.hybrid.hybrid_block:HybridStack.__init__": "corrections.share_balance"
        },
    ),
    Replacement(
        "the padding in multi-token prediction",
        "all",
        why="HybridModel hands the padding mask to its decoder and not to multi-token prediction, whose "
        "routers would balance padding too",
        upstream=NONE_FOUND + "; " + _PULL + "5011 (merged, dev branch) touches the same mask",
        until="HybridModel.forward hands padding_mask to its MTP block",
        pieces={
            _MODEL + "HybridModel.forward": "padding.model_forward",
            _MOE + "moe_layer:MoELayer.forward": "padding.moe_forward",
        },
    ),
    Replacement(
        "the shift of packed sequences",
        "all",
        why="the original goes through the sequences of a pack in Python, with copies to the host for each",
        upstream=NONE_FOUND + " for the loop; " + _PULL + "6205 (open) changes the same function",
        until="the original shifts all sequences at once",
        pieces={_MTP + "_roll_tensor_packed_seq": "packed.shift"},
    ),
    Replacement(
        "the loss of multi-token prediction",
        "all",
        why="the original averages each micro-batch; here it is the step, by weights for position and depth",
        upstream="https://github.com/NVIDIA/Megatron-LM/issues/2417 (open); "
        + _PULL
        + "3159, in 0.19.2, scales within a micro-batch",
        until="process_mtp_loss takes weights for each position and depth",
        pieces={_MODEL + "process_mtp_loss": "packed.process_mtp_loss"},
    ),
    Replacement(
        "the optimizer's state in checkpoints",
        "all",
        why="the original gathers a whole replica's state in the host memory of each process, and in a "
        "buffer of several buckets takes values from where they would be without padding",
        upstream=_PULL + "5077 (merged 2026-06) for the buckets; none found for the memory",
        until="the original writes each parameter once, from a process that holds a part of it",
        pieces={
            _OPTIMIZER + "sharded_param_state_fully_reshardable": "optimizer_state.shards",
            _OPTIMIZER + "load_parameter_state_from_fully_reshardable": "optimizer_state.load",
        },
    ),
    Replacement(
        "the optimizer's groups in checkpoints",
        "all",
        why="for the groups alone, the originals have the optimizer give its whole state: Transformer Engine "
        "copies moments in bf16 to fp32, 8 bytes a parameter on the GPU, for each save and twice to load",
        upstream=NONE_FOUND,
        until="the originals ask for no state of parameters",
        pieces={
            _OPTIMIZER + "state_dict": "optimizer_state.state_dict",
            _OPTIMIZER + "load_state_dict": "optimizer_state.load_state_dict",
        },
    ),
    Replacement(
        "the results of writing in the background",
        "all",
        why="the original starts a third process; the first save waits for it, a killed training leaves it",
        upstream="NVIDIA/nvidia-resiliency-ext#98 (closed) has the same queue; none found for megatron-core",
        until="the original needs no process of its own",
        pieces={
            "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue": (
                "write_results.WriteResults"
            )
        },
    ),
    Replacement(
        "tokens that are gathered",
        "all",
        why="the original gathers the probabilities of all experts, and waits for the host twice",
        upstream=NONE_FOUND,
        until="the original exchanges what the experts of a GPU need, and waits once",
        pieces={_MOE + "moe_layer:MoEAllGatherTokenDispatcher": "gathering.GatherDispatcher"},
    ),
    *replacements_cpu.ROWS,
    Replacement(
        "the rounding of weights in recordings",
        "GPU",
        why="the original's recordings share one mark that says whether fp8 weights are rounded anew, and "
        "each remembers what it last wrote there. After a second depth of multi-token prediction took it "
        "back, a step of one micro-batch did not set it, and the rounded weights stayed as they were",
        upstream=NONE_FOUND,
        until="the recordings compare with what the mark is",
        pieces={
            "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.fp8_param_cache_updated": (
                "gpu.WEIGHTS_ROUNDED"
            )
        },
    ),
    Replacement(
        "APEX's sum of gradients",
        "GPU",
        why="gradient_accumulation_fusion outside Transformer Engine's layers wants this module of APEX",
        upstream=NONE_FOUND,
        until="megatron-core's linear layers add gradients without APEX",
        modules={"fused_weight_gradient_mlp_cuda": "gpu.fused_gradients"},
    ),
    Replacement(
        "mamba-ssm's language models",
        "GPU",
        why="importing its kernels imports its language models, and with them transformers' generation of "
        "text: seconds of each start of a training",
        upstream=NONE_FOUND,
        until="importing mamba_ssm imports no language model",
        modules={"mamba_ssm.models.mixer_seq_simple": "quiet.mamba_models"},
    ),
    Replacement(
        "the optimizer's step",
        "GPU",
        why="the original waits for the norm on the host, and handles each parameter in Python: 145 ms of a "
        "step on an H200, of which the GPU worked for 35",
        upstream=NONE_FOUND,
        until="the original's step takes as long as this one",
        pieces={
            _OPTIMIZER + "_copy_model_grads_to_main_grads": "adam._give_gradients",
            _OPTIMIZER + "_copy_main_params_to_model_params": "adam._give_weights",
            "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm": "adam._gradient_norm",
        },
    ),
    Replacement(
        "the optimizer's step in bf16",
        "GPU",
        why="with gradients and moments in bf16, the originals divide the gradients by the tokens, clip them "
        "and update the weights in passes of their own: 66 ms of a step with 4.1 billion parameters on an "
        "H200, which one pass does in 20; their norm is read at 2.1 TB/s of 4.3",
        upstream=NONE_FOUND,
        until="FusedAdam takes a factor of the gradients from the GPU, and moves memory as fast",
        pieces={"megatron.core.optimizer.clip_grads:l2_norm_impl": "adam.l2_norm"},
        in_objects={
            "megatron.core.distributed:DistributedDataParallel.scale_gradients": (
                "adam.FusedStep._note_scaling"
            ),
            "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm": "adam.FusedStep._norm",
            "megatron.core.optimizer:Adam.step": "adam.FusedStep._adam",
        },
    ),
    Replacement(
        "the gradient of embeddings",
        "GPU",
        why="the original makes one of the whole table and adds it to that of the step, once more for each "
        "depth of multi-token prediction: 1.0 to 3.0 ms of a micro-batch on an H200",
        upstream=NONE_FOUND,
        until="the original adds the rows of the tokens that occur",
        pieces={_LAYERS + "VocabParallelEmbedding.forward": "gpu.embedding_forward"},
    ),
    Replacement(
        "the placeholder of the output layer",
        "GPU",
        why="the original keeps a tensor as large as the output layer, and with multi-token prediction adds "
        "it to itself in each micro-batch: 1 GiB and 0.5 ms on an H200",
        upstream=NONE_FOUND,
        until="the original gives autograd no gradient",
        pieces={_LAYERS + "get_dummy_wgrad": "gpu.placeholder"},
    ),
    Replacement(
        "the logits of routers",
        "GPU",
        why="the original's backward pass copies the inputs in fp32 and multiplies them as TF32: 16 ms of a "
        "step of 1,478 ms on an H200, and 3 ms more to add its result to the gradient from the experts",
        upstream=NONE_FOUND,
        until="the original multiplies bf16 numbers, and adds to the gradient of the experts' inputs",
        pieces={
            _MOE + "router:router_gating_linear": "routing.router_gating_linear",
            _MOE + "moe_layer:MoELayer.preprocess": "routing.preprocess",
        },
    ),
    Replacement(
        "the zeros of gradients",
        "GPU",
        why="the original writes zeros into all gradients before a step, and the products of its first "
        "micro-batch are added to them: 6 ms of a step of 1,478 ms on an H200",
        upstream=NONE_FOUND,
        until="recordings of megatron-core write the gradients in the first micro-batch",
        in_objects={_BUFFERS + "_ParamAndGradBuffer.reset": "gradients.left_alone"},
    ),
    Replacement(
        "the cross entropy",
        "GPU",
        why="the original keeps a copy of the logits for their gradient, 4 GiB at 16k tokens, and reads them "
        "twice; here a program computes the loss of a token and its gradient in one visit",
        upstream=NONE_FOUND,
        until="the original overwrites the logits, and in the forward pass",
        pieces={
            "megatron.core.models.common.language_module.language_module:te_parallel_cross_entropy": (
                "gpu.cross_entropy"
            )
        },
    ),
    Replacement(
        "the acceptance of predicted tokens",
        "GPU",
        why="a metric that is not reported, by one more pass over the logits of each depth, in whose place "
        "their gradient is by then",
        upstream=NONE_FOUND,
        until="an option leaves the metric out",
        pieces={_MTP + "_compute_mtp_acceptance_counts": "gpu.no_acceptance_counts"},
    ),
    Replacement(
        "RMSNorm of widths without a kernel",
        "GPU",
        why="the original has kernels for six widths, and Nano's 2,688 is none. Its general ones take "
        "166 us for 8,192 rows on an H200, forwards and backwards; moving the bytes takes 57",
        upstream=NONE_FOUND,
        until="the original has a kernel for the width, or its general ones are as fast; rmsnorm_bwd stays "
        "for the gradient of residual connections",
        pieces={
            "transformer_engine.pytorch.cpp_extensions:rmsnorm_fwd": "gpu.rmsnorm_fwd",
            "transformer_engine_torch:rmsnorm_bwd": "gpu.rmsnorm_bwd",
            _TE_NORM + "rmsnorm_fwd": "gpu.rmsnorm_fwd",
            _TE_NORM + "rmsnorm_bwd": "gpu.rmsnorm_bwd",
        },
    ),
    Replacement(
        "the gradient of residual connections",
        "GPU",
        why="autograd adds the gradient that goes past a layer to that through its norm in its own pass, "
        "45 us of a layer of Nano for 8,192 rows on an H200; the norm's kernel writes one of them anyway",
        upstream=NONE_FOUND + "; fused_residual_rmsnorm, by Transformer Engine's rmsnorm_bwd_add, is for "
        "norms without a product",
        until="norms with a product (TELayerNormColumnParallelLinear) add it too",
        pieces={
            "megatron.core.ssm.mamba_layer:MambaLayer.forward": "residuals.mamba_forward",
            _LAYER + "_forward_attention": "residuals.forward_attention",
            _LAYER + "_forward_mlp": "residuals.forward_mlp",
            "megatron.core.fusions.fused_bias_dropout:bias_dropout_add_unfused": (
                "residuals.bias_dropout_add_unfused"
            ),
        },
    ),
    Replacement(
        "the scan of Mamba layers",
        "GPU",
        why="the original copies input and gradient into another order, 19 ms of a step of 32k tokens on an "
        "H200, and computes most of its forward pass again in the backward pass",
        upstream=NONE_FOUND,
        until="the original calls the kernels without copies, and keeps what they found",
        pieces={_MIXER + "MambaMixer._ssm_training": "gpu._scan"},
    ),
    Replacement(
        "the routed experts",
        "GPU",
        why="the original waits for the router in every layer and handles each expert in Python, which kept "
        "the GPU idle for half of a step on an H200 at 16k tokens; in fp8 a step took 2.2 times as long as "
        "with these experts in bf16",
        upstream=NONE_FOUND,
        until="TEGroupedMLP takes the numbers of tokens from the GPU and all experts in one tensor, in "
        "fp8 too",
        pieces={
            _MOE + "experts:TEGroupedMLP.forward": "gpu.experts_forward",
            "megatron.core.distributed:DistributedDataParallel._make_backward_post_hook": (
                "gpu.make_backward_post_hook"
            ),
            _DISPATCHER + "_maybe_dtoh_and_synchronize": "gpu.maybe_dtoh_and_synchronize",
            _DISPATCHER + "dispatch_postprocess": "gpu.dispatch_postprocess",
            _DISPATCHER + "combine_preprocess": "gpu.combine_preprocess",
        },
    ),
)


def rows(machine: Machine) -> list[Replacement]:
    """The rows for a machine."""
    return [row for row in TABLE if row.machine in ("all", machine)]


def prepare(machine: Machine) -> None:
    """Replace whole modules; before megatron-core is imported."""
    for row in rows(machine):
        for module, by in row.modules.items():
            made: Any = None if by is None else stand_in(by)()
            sys.modules.setdefault(module, made)


def apply(machine: Machine) -> None:
    """Put everything of the table in its place, after megatron-core's import."""
    for row in rows(machine):
        for name, by in row.pieces.items():
            originals.replace(name, stand_in(by))
