"""Everything that replaces or corrects a piece of megatron-core: one table, which is applied by `apply`.

A row goes when its test in tests/unit/model/megatron/test_replacements.py (tests/gpu for those of a GPU) says
that the installed release does not need it any more: the test runs the original piece and shows its fault.
"""

from __future__ import annotations

import sys
from typing import Any

from snaketron.model.megatron import originals
from snaketron.model.megatron.row import Machine, Replacement, Value, stand_in

NONE_FOUND = "none found"
NO_CPU = "none: NVIDIA-NeMo/Speech#14244 says that megatron-core has no path for CPUs"
_PULL = "https://github.com/NVIDIA/Megatron-LM/pull/"

_MTP = "megatron.core.transformer.multi_token_prediction:"
_MODEL = "megatron.core.models.hybrid.hybrid_model:"
_LANGUAGE = "megatron.core.models.common.language_module.language_module:LanguageModule."
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."
_MOE = "megatron.core.transformer.moe."
_DISPATCHER = _MOE + "token_dispatcher:MoEAlltoAllTokenDispatcher."
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer:"
_MIXER = "megatron.core.ssm.mamba_mixer:"
_MAMBA_CONTEXT = "megatron.core.ssm.mamba_context_parallel:"
# Modules that write the literal device "cuda".
_ON_CUDA = """
    dist_checkpointing.exchange_utils dist_checkpointing.strategies.state_dict_saver
    models.hybrid.hybrid_block optimizer.clip_grads optimizer.grad_scaler optimizer.optimizer
    pipeline_parallel.schedules rerun_state_machine transformer.moe.moe_layer utils
"""
ON_CUDA = tuple("megatron.core." + name for name in _ON_CUDA.split())

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
    # ------------------------------------------------------------------------------------------- CPU
    Replacement(
        "packages of the GPU",
        "CPU",
        why="a login node has the environment of the GPU nodes, where importing them fails without a driver",
        upstream=NO_CPU,
        until="stays",
        modules={"transformer_engine": None, "mamba_ssm": None, "causal_conv1d": None},
    ),
    Replacement(
        "Triton",
        "CPU",
        why="its kernels are for GPUs; importing it and megatron-core's 135 kernels, whose sources are "
        "parsed, takes 0.3 s of 3.6. One module with kernels is imported also where Triton is not installed",
        upstream=NONE_FOUND,
        until="megatron-core imports its kernels where they are called, or Triton's import takes no time",
        modules={
            "triton": None,
            "megatron.core.transformer.moe.ops.paged_stash": "quiet.paged_stash",
        },
    ),
    Replacement(
        "torch.cuda",
        "CPU",
        why="megatron-core allocates on torch.cuda.current_device(), and moves optimizer state by .cuda()",
        upstream=NO_CPU,
        until="stays",
        pieces={
            "torch:cuda.Stream": "cpu.Stream",  # stays a class: others annotate with it
            "torch:cuda.current_device": "cpu.current_device",
            "torch:cuda.set_device": "cpu.set_device",
            "torch:cuda.synchronize": "cpu.synchronize",
            "torch:cuda.stream": "cpu.stream",
            "torch:cuda.current_stream": "cpu.current_stream",
            "torch:cuda.manual_seed": "cpu.manual_seed",  # one generator plays both parts
            "torch:cuda.set_rng_state": "cpu.set_rng_state",
            "torch:cuda.get_rng_state": "cpu.get_rng_state",
            "torch:cuda.random.get_rng_state": "cpu.get_rng_state",
            "torch:Tensor.cuda": "cpu.cuda",
        },
    ),
    Replacement(
        "the names of tensor types",
        "CPU",
        why='the optimizers recognise types by names such as "torch.cuda.FloatTensor"',
        upstream=NO_CPU,
        until="stays",
        pieces={"torch:Tensor.type": "cpu.tensor_type"},
    ),
    Replacement(
        'the device "cuda"',
        "CPU",
        why='these modules make tensors with the literal device "cuda"',
        upstream=NO_CPU,
        until="stays; a module goes when it has no literal device any more",
        pieces={f"{module}:torch": "cpu.torch_on_cpu" for module in ON_CUDA},
    ),
    Replacement(
        "the random numbers' state",
        "CPU",
        why="the original's setter waits until CUDA is initialised, which here never happens",
        upstream=NO_CPU,
        until="stays",
        pieces={"megatron.core.tensor_parallel.random:_set_cuda_rng_state": "cpu.set_rng_state"},
    ),
    Replacement(
        "the sizes of what experts are sent",
        "CPU",
        why="gloo wants the sizes of splits as lists; the original converts only what is on a GPU",
        upstream=NO_CPU,
        until="the original converts tensors on a CPU as well",
        pieces={_MOE + "token_dispatcher:maybe_move_tensor_to_cpu": "cpu.move_to_cpu"},
    ),
    Replacement(
        "Adam",
        "CPU",
        why="the distributed optimizer cannot resume torch's AdamW: that has no state before its first step, "
        "and after loading all parameters would share one step counter",
        upstream=NO_CPU,
        until="the distributed optimizer resumes torch.optim.AdamW",
        pieces={
            "megatron.core.optimizer:Adam": "cpu.FusedAdam",
            "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER": Value(False),
            "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE": Value(True),
            "megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER": Value(True),
        },
    ),
    Replacement(
        "the norm of gradients",
        "CPU",
        why="the original adds up the squares of a tensor in float32: a step's norm came out 9e-6 of itself "
        "too small in one process and 3e-6 under TP 2, and gradients are clipped by it",
        upstream=NO_CPU,
        until="the original adds up in float64, or in many short sums",
        pieces={"megatron.core.optimizer.clip_grads:l2_norm_impl": "cpu.l2_norm"},
    ),
    Replacement(
        "the sums of gradients and the weights of one rank",
        "CPU",
        why="the originals have gloo copy each buffer to itself, in 4 ms. Its thread does so with threads of "
        "OpenMP, and where these are more than the cores they no longer wait for each other awake: a step of "
        "a tuning took 0.30 s with two threads instead of 0.19",
        upstream=NONE_FOUND,
        until="the originals do nothing in a group of one rank",
        pieces={
            _BUFFERS + "dist_all_gather_func": "cpu.gather_weights",
            _BUFFERS + "dist_reduce_scatter_func": "cpu.scatter_gradients",
        },
    ),
    Replacement(
        "Transformer Engine's layers that no spec chooses",
        "CPU",
        why="the last norm of a stack and the latent projections of experts are Transformer Engine's always",
        upstream=NO_CPU,
        until="HybridStack and MoELayer take these layers from a spec",
        pieces={
            "megatron.core.models.hybrid.hybrid_block:TENorm": "cpu_layers.RMSNorm",
            _MOE + "moe_layer:HAVE_TE": Value(True),
            _MOE + "moe_layer:TELinear": "cpu_layers.DuplicatedLinear",
        },
    ),
    Replacement(
        "mamba-ssm",
        "CPU",
        why="its kernels are for GPUs, and MambaMixer has no other scan",
        upstream=NO_CPU,
        until="MambaMixer trains without mamba-ssm",
        pieces={
            _MIXER + "HAVE_MAMBA_SSM": Value(True),
            _MIXER + "ExtendedRMSNorm": "cpu_layers.GatedRMSNorm",
            _MIXER + "mamba_split_conv1d_scan_combined": "mamba2_layer.mamba_split_conv1d_scan_combined",
            _MIXER + "_check_mamba_sequence_packing_support": "cpu.check_sequence_packing",
        },
    ),
    Replacement(
        "the partition of packed sequences",
        "CPU",
        why="ranks that share packed sequences ask Transformer Engine which positions are theirs",
        upstream=NO_CPU,
        until="megatron-core computes the positions itself",
        pieces={
            _MAMBA_CONTEXT + "tex": "cpu.transformer_engine_torch",
            _MAMBA_CONTEXT + "is_te_min_version": "cpu.is_te_min_version",
        },
    ),
    Replacement(
        "linear layers and experts of one rank",
        "CPU",
        why="for a single rank too, the originals are autograd functions in Python, and experts without a "
        "token are called: more than half of the 15 ms that a small model took to generate a token. In a "
        "training, each expert costs fifteen small operations beside its products",
        upstream=NONE_FOUND,
        until="a linear layer of one rank is one product",
        pieces={
            "megatron.core.tensor_parallel.layers:ColumnParallelLinear._forward_impl": "cpu.linear",
            "megatron.core.tensor_parallel.layers:RowParallelLinear._forward_impl": "cpu.linear",
            "megatron.core.tensor_parallel.layers:reduce_from_tensor_model_parallel_region": (
                "cpu.reduce_over_ranks"
            ),
            _MOE + "experts:SequentialMLP.forward": "cpu_experts.experts_forward",
        },
    ),
    Replacement(
        "the logits of what is not trained",
        "CPU",
        why="the original computes the logits of all positions, and a tuning trains about half of them",
        upstream=NONE_FOUND,
        until="HybridModel leaves positions without a loss out of its output layer",
        pieces={_LANGUAGE + "compute_language_model_loss": "packed.compute_language_model_loss"},
    ),
    # ------------------------------------------------------------------------------------------- GPU
    Replacement(
        "APEX's sum of gradients",
        "GPU",
        why="gradient_accumulation_fusion outside Transformer Engine's layers wants this module of APEX",
        upstream=NONE_FOUND,
        until="megatron-core's linear layers add gradients without APEX",
        modules={"fused_weight_gradient_mlp_cuda": "gpu.fused_gradients"},
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
        "H200, which one pass does in 20",
        upstream=NONE_FOUND,
        until="FusedAdam takes a factor of the gradients from the GPU, and moves memory as fast",
        in_objects={
            "megatron.core.distributed:DistributedDataParallel.scale_gradients": (
                "adam.FusedStep._note_scaling"
            ),
            "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm": "adam.FusedStep._norm",
            "megatron.core.optimizer:Adam.step": "adam.FusedStep._adam",
        },
    ),
    Replacement(
        "the cross entropy",
        "GPU",
        why="the original keeps a copy of the logits for their gradient, 4 GiB at 16k tokens",
        upstream=NONE_FOUND,
        until="the original overwrites the logits",
        pieces={
            "megatron.core.models.common.language_module.language_module:te_parallel_cross_entropy": (
                "gpu.cross_entropy"
            )
        },
    ),
    Replacement(
        "the acceptance of predicted tokens",
        "GPU",
        why="a metric that is not reported, by one more pass over the logits of each depth",
        upstream=NONE_FOUND,
        until="an option leaves the metric out",
        pieces={_MTP + "_compute_mtp_acceptance_counts": "gpu.no_acceptance_counts"},
    ),
    Replacement(
        "the scan of Mamba layers",
        "GPU",
        why="the original copies input and gradient into another order, 19 ms of a step of 32k tokens on an "
        "H200",
        upstream=NONE_FOUND,
        until="the original calls the kernels without copies",
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
