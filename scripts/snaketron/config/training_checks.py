"""Checks of the values of one training: against each other, the model and the nodes.

Each returns problems, with the paths of the keys and both numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from snaketron.config.base import FLEXIBLE
from snaketron.config.cluster import Cluster, Parallel
from snaketron.config.linears import check_names, linears
from snaketron.config.training import Adapters, Model, Optimizer, Pretrain, Run, Tuning
from snaketron.config.trainings import Training

if TYPE_CHECKING:
    from snaketron.config import Config


def check_training(training: Training, config: Config) -> list[str]:
    """The values of one training, against each other, the model and the nodes."""
    return [
        *check_parallel(training),
        *check_vocabulary(training, config.tokenizer.vocab_size),
        *check_nodes(training, config.cluster),
        *check_precision(training, config.cluster),
        *check_widths(training),
        *check_recomputation(training),
        *check_optimizer(training),
        *check_batches(training, config.sft_data.padding_multiple),
        *check_steps(training),
        *check_dispatcher(training),
        *(check_adapters(training.at("target_modules"), training.adapters) if training.adapters else ()),
    ]


def check_evaluation(config: Config) -> list[str]:
    """The processes of an evaluation against the model and the nodes, as those of a training."""
    run = Pretrain(parallel=config.eval.parallel)
    evaluation = Training(
        section="eval",
        model=config.model,
        run=run,
        seq_length=run.seq_length,
        global_batch_size=run.global_batch_size,
        train_iters=1,
        elsewhere={},
    )
    return [*check_parallel(evaluation), *check_nodes(evaluation, config.cluster)]


def check_parallel(training: Training) -> list[str]:
    """Parallel sizes against the model; the rules are megatron-core's."""
    model, run, parallel, at = training.model, training.run, training.run.parallel, training.at("parallel")
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    of_layers = {
        "M": ["mamba_num_heads", "mamba_num_groups"],
        "E": ["moe_shared_expert_intermediate_size"],
        "-": ["ffn_hidden_size"],
    }
    shared = ["num_attention_heads"]
    shared += [key for letter, keys in of_layers.items() if letter in model.layers for key in keys]
    if model.mtp_num_layers:
        shared.append("hidden_size")  # which a depth's joining projection gives
    if model.num_query_groups >= tp:
        shared.append("num_query_groups")
    problems = [
        divides(f"model.{k}", getattr(model, k), f"{at}.tensor_model_parallel_size", tp) for k in shared
    ]
    problems += _check_context(at, model, parallel)
    if model.num_query_groups < tp:  # each group is then on several processes
        groups = model.num_query_groups
        problems.append(divides(f"{at}.tensor_model_parallel_size", tp, "model.num_query_groups", groups))
    problems += _check_experts(at, model, parallel)
    if (layers := len(model.hybrid_layer_pattern)) < stages:
        problems.append(
            f"{at}.pipeline_model_parallel_size {stages} is more than the {layers} layers of "
            "model.hybrid_layer_pattern, and each stage needs one"
        )
    if "layer" in run.recompute and len(run.recompute) > 1:
        others = f"layer is everything; leave out the others of {run.recompute}"
        problems.append(f"{training.at('recompute')}: {others}")
    return [p for p in problems if p]


def _check_context(at: str, model: Model, parallel: Parallel) -> list[str]:
    """Under context parallelism the processes share the heads of a Mamba-2 layer, not the sequence.

    Each process then has groups of its own, or several processes share one.
    """
    tp, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if context == 1 or "M" not in model.layers:
        return []
    by = f"{at}.tensor_model_parallel_size x context_parallel_size ="
    problems = [divides("model.mamba_num_heads", model.mamba_num_heads, by, tp * context)]
    groups = max(1, model.mamba_num_groups // tp)
    if max(groups, context) % min(groups, context):
        problems.append(
            f"model.mamba_num_groups {model.mamba_num_groups} / {at}.tensor_model_parallel_size {tp} and "
            f"context_parallel_size {context}: neither divides the other"
        )
    return problems


def _check_experts(at: str, model: Model, parallel: Parallel) -> list[str]:
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    width, processes = model.moe_ffn_hidden_size, parallel.world_size // parallel.pipeline_model_parallel_size
    of_experts = [
        divides("model.num_moe_experts", model.num_moe_experts, f"{at}.expert_model_parallel_size", ep),
        divides("model.moe_ffn_hidden_size", width, f"{at}.expert_tensor_parallel_size", etp),
    ]
    return [
        *(of_experts if model.routed_layers else ()),
        divides(
            f"{at}.tensor_model_parallel_size x context_parallel_size x data_parallel_size =",
            processes,
            "expert_model_parallel_size x expert_tensor_parallel_size =",
            ep * etp,
        ),
    ]


def check_vocabulary(training: Training, vocab_size: int) -> Iterator[str]:
    """Rows that fill up the vocabulary take part in the loss, so every layout has as many of them."""
    tp, multiple = (
        training.run.parallel.tensor_model_parallel_size,
        training.model.make_vocab_size_divisible_by,
    )
    rows = math.ceil(vocab_size / multiple) * multiple
    if rows % tp:
        yield (
            f"model.make_vocab_size_divisible_by {multiple} gives {vocab_size} tokens {rows} rows, which "
            f"{training.at('parallel')}.tensor_model_parallel_size {tp} does not divide, and with more rows "
            f"the loss would be another one; give {math.lcm(multiple, tp)}"
        )


def check_nodes(training: Training, cluster: Cluster) -> list[str]:
    """The processes of a training must fill its nodes."""
    gpus, tasks = cluster.gpus_per_node, cluster.tasks_per_node
    if gpus and tasks:
        return [
            f"cluster.tasks_per_node {tasks} beside cluster.gpus_per_node {gpus}: each GPU has one process, "
            "so leave out tasks_per_node; to use fewer GPUs of a node, lower gpus_per_node"
        ]
    by = "tasks_per_node" if tasks else "gpus_per_node"
    per_node, processes = tasks or gpus, training.run.parallel.world_size
    if not per_node or processes <= per_node or processes % per_node == 0:
        return []
    return [
        f"{training.at('parallel')}: {processes} processes do not fill nodes of cluster.{by} {per_node}; "
        f"{processes // per_node * per_node} or {-(-processes // per_node) * per_node} would"
    ]


def check_precision(training: Training, cluster: Cluster) -> Iterator[str]:
    """What a GPU or megatron-core does not compute in a precision; a job says so when it has begun."""
    model, parallel, at = training.model, training.run.parallel, training.at("precision")
    precision, kept, stages = model.precision, model.bf16_layers_at_end, parallel.pipeline_model_parallel_size
    most = len(model.hybrid_layer_pattern) // stages
    if precision == "nvfp4" and cluster.gpu in ("h100", "h200"):
        yield f"{at} nvfp4 needs a Blackwell GPU, and cluster.gpu is {cluster.gpu}; take bf16 or fp8_current"
    if precision == "fp32" and cluster.gpus_per_node and parallel.context_parallel_size > 1:
        yield (
            f"{training.at('parallel')}.context_parallel_size {parallel.context_parallel_size} needs bf16 on "
            f"GPUs, and {at} is fp32: Transformer Engine has no attention in fp32 that shares a sequence"
        )
    if cluster.gpus_per_node and precision not in ("fp32", "nvfp4"):  # those by Transformer Engine
        yield from _check_experts_of_gpus(training)
    if precision == "fp8_delayed" and kept:
        yield f"{at} fp8_delayed takes no model.bf16_layers_at_end ({kept}); set it to 0, or take fp8_current"
    elif precision.startswith("fp8") and kept > most:
        yield (
            f"model.bf16_layers_at_end {kept} is more than {most}, and under {at} {precision} megatron-core "
            f"takes no more than {len(model.hybrid_layer_pattern)} layers / {stages} stages of "
            f"{training.at('parallel')}"
        )


def _check_experts_of_gpus(training: Training) -> Iterator[str]:
    """The product of all routed experts of a GPU, in bf16, takes rows of a multiple of 16 bytes."""
    model, parts = training.model, training.run.parallel.expert_tensor_parallel_size
    width = "hidden_size" if model.moe_latent_size is None else "moe_latent_size"
    for name, split in ((width, 1), ("moe_ffn_hidden_size", parts)) if model.routed_layers else ():
        if (size := getattr(model, name)) % (8 * split):
            each = f" / {training.at('parallel')}.expert_tensor_parallel_size {split}" if split > 1 else ""
            yield f"model.{name} {size}{each}: routed experts on GPUs need a multiple of 8 in bf16 and fp8"


def check_widths(training: Training) -> Iterator[str]:
    """fp8 products want multiples of 16; Transformer Engine says so in the first step.

    Routed experts and routers may have any width.
    """
    model, run, tp = training.model, training.run, training.run.parallel.tensor_model_parallel_size
    if not model.precision.startswith("fp8"):
        return
    at, by = training.at("precision"), f"{training.at('parallel')}.tensor_model_parallel_size"
    pattern = model.hybrid_layer_pattern
    in_fp8 = pattern[: len(pattern) - model.bf16_layers_at_end]
    for linear in dict.fromkeys(linears(model, in_fp8, with_mtp=True)):
        for what, width, split in (
            ("inputs", linear.inputs, linear.parallel == "row"),
            ("outputs", linear.outputs, linear.parallel == "column"),
        ):
            parts = tp if split else 1
            if width % (16 * parts) and not linear.experts and not linear.name.endswith(".router"):
                each = f", {width / parts:g} for each of {by} {tp}" if parts > 1 else ""
                yield (
                    f"{at} {model.precision} needs widths that are multiples of 16, and {linear.name} has "
                    f"{width} {what}{each}; change the sizes of the model, or take bf16"
                )
    multiple, length = 16 * run.parallel.context_parallel_size * tp, training.seq_length
    if run.micro_batch_size * length % multiple:
        yield (
            f"{at} {model.precision} needs micro-batches of a multiple of {multiple} tokens, and "
            f"micro_batch_size {run.micro_batch_size} x {training.at('seq_length')} {length} has "
            f"{run.micro_batch_size * length}"
        )


def check_recomputation(training: Training) -> Iterator[str]:
    """What megatron-core does not compute again: in one precision, and beside recordings of layers."""
    run, at = training.run, training.at("recompute")
    if training.model.precision == "fp8_delayed":
        under = f"under {training.at('precision')} fp8_delayed"
        if "layernorm" in run.recompute:
            yield f"{at}: no layernorm {under}; leave it out"
        # A depth is computed again, and its layers again in that. Transformer Engine keeps the scales of both
        # and takes one, so that those of a step come up ever later.
        if "layer" in run.recompute and training.model.mtp_num_layers:
            yield (
                f"{at}: no layer {under} with multi-token prediction, whose layers would be computed with "
                "scales of steps long ago; take fp8_current"
            )
    if not (isinstance(run, Pretrain) and run.cuda_graphs):
        return
    for module in run.recompute:  # others are in layers that are not recorded
        if module in ("layer", "core_attn", "moe"):
            yield (
                f"{at}: {module} is not computed again where layers are recorded; leave it out, or "
                f"{training.at('cuda_graphs')} true"
            )


def check_optimizer(training: Training) -> Iterator[str]:
    """megatron-core offloads fp32 moments of weights in bf16.

    Of weights in fp32 it would not update those that stay on the GPU, and could not read a checkpoint.
    """
    run, at = training.run, f"{training.at('offload_optimizer')} {training.run.offload_optimizer}"
    if not run.offload_optimizer:
        return
    if training.model.precision == "fp32":
        yield f"{at} needs weights in bf16, and {training.at('precision')} is fp32; take bf16 or below"
    if run.optimizer.moment_precision == "bf16":
        yield (
            f"{at} keeps moments in fp32, on the GPU too: set {training.at('optimizer')}.moment_precision to "
            "fp32, or offload nothing"
        )


def check_batches(training: Training, padding_multiple: int | None) -> list[str]:
    """Sequences and batches are cut into equal parts."""
    run, parallel = training.run, training.run.parallel
    copies, tp = parallel.data_parallel_size, parallel.tensor_model_parallel_size
    context, multiple = parallel.context_parallel_size, parallel.sequence_multiple
    problems = [
        divides(
            training.at("global_batch_size"),
            training.global_batch_size,
            f"micro_batch_size {run.micro_batch_size} x data_parallel_size {copies} =",
            run.micro_batch_size * copies,
        ),
        divides(
            training.at("seq_length"),
            training.seq_length,
            f"tensor {tp} x context {context} parallel parts =",
            tp * multiple,
        ),
    ]
    if training.packed and padding_multiple and context > 1:
        by = f"2 x {training.at('parallel')}.context_parallel_size {context} ="
        problems.append(divides("sft_data.padding_multiple", padding_multiple, by, multiple))
    return [p for p in problems if p]


def check_steps(training: Training) -> list[str]:
    """The schedule of a training fits into its steps, and its learning rate falls."""
    run, problems = training.run, []
    if isinstance(run, Tuning):
        iters = f"{training.at('train_iters')} {run.train_iters}"
        if run.switch_loss_average_after is not None and run.switch_loss_average_after >= run.train_iters:
            at = training.at("switch_loss_average_after")
            problems.append(
                f"{at} {run.switch_loss_average_after} is not less than {iters}, so it would never switch; "
                "leave it out"
            )
        if run.warmup_iters >= run.train_iters:
            problems.append(f"{training.at('warmup_iters')} {run.warmup_iters} is not less than {iters}")
    least, most = run.optimizer.min_learning_rate, run.optimizer.learning_rate
    if least > most:
        problems.append(
            f"{training.at('optimizer')}.min_learning_rate {least} is more than learning_rate {most}"
        )
    if run.optimizer.gradient_precision == "bf16" and training.model.precision == "fp32":
        problems.append(
            f"{training.at('optimizer')}.gradient_precision bf16 has no effect under model.precision fp32, "
            "whose gradients are fp32; leave it out"
        )
    return problems


def check_adapters(at: str, adapters: Adapters) -> list[str]:
    """The targets are names of some model; `sizes.checks` looks for them in this one when LoRA is to run."""
    targets = adapters.target_modules
    return check_names(at, targets) or ([] if targets else [f"{at}: name the layers to adapt"])


def check_dispatcher(training: Training) -> Iterator[str]:
    """What is wrong with the dispatcher of a training, and with the overlap of the expert of all tokens."""
    model, run = training.model, training.run
    at = f"{training.at('moe_token_dispatcher')} {run.moe_token_dispatcher}"
    if run.moe_token_dispatcher in FLEXIBLE and model.precision == "fp32":
        yield f"{at} sends tokens in bf16, and model.precision is fp32; set it to bf16 or below"
    parallel = run.parallel
    processes = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    if run.moe_token_dispatcher == "deepep" and processes == 1:
        yield (
            f"{at} needs experts on several processes: raise {training.at('parallel')}"
            ".expert_model_parallel_size (now 1), or take alltoall"
        )
    overlap = training.at("moe_shared_expert_overlap")
    if run.moe_token_dispatcher == "allgather":
        if parallel.expert_tensor_parallel_size > 1:
            yield f"{at} takes whole experts: set expert_tensor_parallel_size to 1, or take alltoall"
        if run.moe_shared_expert_overlap:
            yield f"{at} leaves nothing to overlap with: leave {overlap} out, or take alltoall"
    if not run.moe_shared_expert_overlap:
        return
    if model.moe_latent_size is not None:
        yield (
            f"{overlap}: megatron-core has no overlap for experts in a latent space in a training "
            f"(model.moe_latent_size {model.moe_latent_size}); leave it out"
        )
    if "shared_experts" in run.recompute:
        yield f"{overlap} and shared_experts in {training.at('recompute')}: leave one of them out"


def of_gpus(model: Model, run: Run, optimizer: Optimizer | None) -> dict[str, str | float]:
    """The values with which a CPU cannot compute, by their keys. Without an optimizer nothing is trained."""
    ep, etp = run.parallel.expert_model_parallel_size, run.parallel.expert_tensor_parallel_size
    moments = optimizer.moment_precision if optimizer else "fp32"
    keys = {
        # gloo gathers parts of one size, and processes send others as many tokens as their experts get.
        "parallel.expert_tensor_parallel_size": f"{etp} beside expert_model_parallel_size {ep}"
        if min(ep, etp) > 1
        else "",
        "precision": model.precision if model.precision not in ("fp32", "bf16") else "",
        "optimizer.moment_precision": moments if moments == "bf16" else "",
        "cuda_graphs": getattr(run, "cuda_graphs", None) or "",  # of pretraining
        "offload_optimizer": (optimizer and run.offload_optimizer) or "",
        "recompute": "layernorm" if "layernorm" in run.recompute else "",  # by Transformer Engine
        "moe_token_dispatcher": run.moe_token_dispatcher if run.moe_token_dispatcher in FLEXIBLE else "",
        "moe_shared_expert_overlap": run.moe_shared_expert_overlap or "",
    }
    return {key: value for key, value in keys.items() if value}


def divides(name: str, value: int, by_name: str, by: int) -> str:
    return "" if value % by == 0 else f"{name} {value} is not divisible by {by_name} {by}"
