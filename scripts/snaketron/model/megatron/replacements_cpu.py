"""The rows of `replacements.TABLE` for machines without a GPU."""

from __future__ import annotations

from snaketron.model.megatron.row import NONE_FOUND, Replacement, Value

NO_CPU = "none: NVIDIA-NeMo/Speech#14244 says that megatron-core has no path for CPUs"

_LANGUAGE = "megatron.core.models.common.language_module.language_module:LanguageModule."
_MOE = "megatron.core.transformer.moe."
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer:"
_LAYERS = "megatron.core.tensor_parallel.layers:"
_MIXER = "megatron.core.ssm.mamba_mixer:"
_MAMBA_CONTEXT = "megatron.core.ssm.mamba_context_parallel:"
# Modules that write the literal device "cuda".
_ON_CUDA = """
    dist_checkpointing.exchange_utils dist_checkpointing.strategies.state_dict_saver
    models.hybrid.hybrid_block optimizer.clip_grads optimizer.grad_scaler optimizer.optimizer
    pipeline_parallel.schedules rerun_state_machine transformer.moe.moe_layer utils
"""
ON_CUDA = tuple("megatron.core." + name for name in _ON_CUDA.split())

ROWS = (
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
            _LAYERS + "ColumnParallelLinear._forward_impl": "cpu.linear",
            _LAYERS + "RowParallelLinear._forward_impl": "cpu.linear",
            _LAYERS + "reduce_from_tensor_model_parallel_region": "cpu.reduce_over_ranks",
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
)
