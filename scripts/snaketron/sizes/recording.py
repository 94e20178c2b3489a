"""What a training does in a step, and what GPUs record of it (CUDA graphs)."""

from __future__ import annotations

import math

from snaketron.config import Adapters, Cluster, Config, Model, Run, Training
from snaketron.config.base import FLEXIBLE
from snaketron.sizes.gpus import usable_bytes
from snaketron.sizes.layout import dispatcher, layout
from snaketron.sizes.memory import peak_bytes
from snaketron.sizes.work import Work

# Tokens of a sequence from which on kernels are recorded. At 64 tokens cuDNN's backward pass of attention
# takes a kernel that reads memory of an earlier call when a recording starts it: gradients were wrong, or the
# process ended (Transformer Engine 2.20.2). From 512 on gradients are right.
SHORTEST_RECORDED = 512


def work(config: Config, training: Training) -> Work:
    """What a training does in a step."""
    run = training.run
    does = Work(
        model=training.model,
        vocab_size=config.tokenizer.vocab_size,
        seq_length=training.seq_length,
        global_batch_size=training.global_batch_size,
        run=run,
        optimizer=run.optimizer,
        dispatcher=dispatcher(training.model, run, config.cluster),
    )
    if run.cuda_graphs is not None:
        return does._replace(cuda_graphs=run.cuda_graphs)
    packed, cluster = training.packed, config.cluster
    usable = usable_bytes(cluster) or math.inf
    return does._replace(
        recorded=recordable(
            *(training.model, run, training.seq_length),
            packed=packed,
            adapters=does.adapters,
            cluster=cluster,
        ),
        cuda_graphs=records_layers(does, packed=packed, cluster=cluster, usable=usable),
    )


def recordable(
    model: Model, run: Run, seq_length: int, *, packed: bool, adapters: Adapters | None, cluster: Cluster
) -> bool:
    """Whether GPUs record the kernels of whole micro-batches.

    They do where one process holds all layers, or its share of each (tensor parallelism), and nothing in a
    micro-batch waits for the host. The exchange of tokens between GPUs waits, as do experts in fp32 and nvfp4
    (`model.megatron.gpu`). The dropout of adapters draws other random numbers in each step.

    Packs of other sizes have recordings of their own, which share the rounded weights. Transformer Engine
    2.20.2 moves their transposes under fp8_blockwise, once it has rounded them in a validation, and gradients
    were not finite.
    """
    sizes = run.parallel
    return (
        sizes.pipeline_model_parallel_size == sizes.context_parallel_size == 1
        and sizes.expert_model_parallel_size == sizes.expert_tensor_parallel_size == 1
        and run.moe_token_dispatcher not in FLEXIBLE
        and not run.moe_shared_expert_overlap
        and not (adapters and adapters.dropout)
        and not (packed and model.precision == "fp8_blockwise")
        and _was_tried(model)
        and _repeats(run, seq_length, cluster)
    )


def records_layers(work: Work, *, packed: bool, cluster: Cluster, usable: float) -> bool:
    """Whether GPUs record attention and Mamba layers, each by itself.

    They do where that was tried: where the GPUs of one node share experts, so that no whole micro-batch is
    recorded, NCCL takes the tokens to them, and `usable` bytes of a GPU have room for it. With a pipeline
    each micro-batch under way would have a recording of its own, and so would packs of other sequences.
    """
    model, run = work.model, work.run
    sizes = run.parallel
    return (
        sizes.pipeline_model_parallel_size == sizes.context_parallel_size == 1
        and sizes.expert_model_parallel_size > 1 == sizes.expert_tensor_parallel_size
        and run.moe_token_dispatcher not in FLEXIBLE
        and not run.moe_shared_expert_overlap
        and not run.offload_optimizer
        and not packed
        and _was_tried(model)
        and _repeats(run, work.seq_length, cluster)
        and peak_bytes(work._replace(cuda_graphs=True)) <= usable
    )


def _was_tried(model: Model) -> bool:
    """Whether kernels of this precision were recorded, and had the losses of kernels that were not."""
    return model.precision == "bf16" or model.precision.startswith("fp8")


def _repeats(run: Run, seq_length: int, cluster: Cluster) -> bool:
    """Whether each micro-batch starts the same kernels on the same sizes, as far as the host sees.

    So do packs, whose sizes are rounded up (`train.sft_batches`). Recomputation wants random numbers that a
    recording does not have. Between nodes, gradients are summed while others are computed.
    """
    return (
        seq_length >= SHORTEST_RECORDED
        and not set(run.recompute) - {"scan"}
        and layout(run, cluster).nodes == 1
    )
