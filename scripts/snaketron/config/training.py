"""The model, and the trainings."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from snaketron.config.base import (
    Count,
    Dispatcher,
    Fraction,
    Module,
    Name,
    Positive,
    Precision,
    Section,
    Seed,
    Share,
    Text,
    Weight,
    key,
)
from snaketron.config.cluster import Parallel
from snaketron.config.data import CorpusWeight, SourceWeight

from pydantic import ConfigDict, Field


class Model(Section):
    """The architecture, in megatron-core's names. The default has 1.35 million parameters."""

    model_config = ConfigDict(frozen=True)  # `sizes.stages` keeps what it finds for one

    hybrid_layer_pattern: Annotated[str, Field(pattern=r"^[ME*\-]+$")] = key(
        "M*EM*E", "one letter a layer: M Mamba-2, E mixture of experts, * attention, - dense MLP"
    )
    hidden_size: Positive = key(128, "width of the residual stream")
    ffn_hidden_size: Positive = key(256, "inner width of a dense MLP layer (-)")
    num_attention_heads: Positive = key(4, "query heads of an attention layer")
    num_query_groups: Positive = key(2, "key and value heads (grouped-query attention)")
    kv_channels: Positive = key(32, "width of an attention head")
    mamba_num_heads: Positive = key(8, "heads of a Mamba-2 layer")
    mamba_head_dim: Positive = key(32, "width of a Mamba-2 head")
    mamba_state_dim: Positive = key(16, "size of the state of a head")
    mamba_num_groups: Positive = key(
        2, "groups of heads that share B and C; a multiple of the tensor parallel size"
    )
    num_moe_experts: Positive = key(8, "routed experts of a layer")
    moe_router_topk: Positive = key(2, "routed experts that a token visits")
    moe_ffn_hidden_size: Positive = key(128, "inner width of a routed expert")
    moe_latent_size: Positive | None = key(
        64, "width of the latent space in which the routed experts work; null: the hidden size"
    )
    moe_shared_expert_intermediate_size: Positive = key(
        256, "inner width of the expert that every token visits"
    )
    moe_router_topk_scaling_factor: Annotated[float, Field(gt=0)] = key(
        2.5, "factor on the routed experts' output"
    )
    moe_aux_loss_coeff: Weight = key(1e-4, "weight of the router's load balancing loss")
    moe_router_bias_update_rate: Weight = key(
        1e-3, "step of the expert bias towards an even load, a step of training"
    )
    mtp_num_layers: Count = key(1, "depths of multi-token prediction; they share one block. 0 turns it off")
    mtp_hybrid_layer_pattern: Annotated[str, Field(pattern=r"^[ME*\-]+$")] = key(
        "*", "layers of the multi-token prediction block"
    )
    mtp_loss_scaling_factor: Weight = key(0.3, "weight of the multi-token prediction loss")
    init_method_std: Annotated[float, Field(gt=0)] = key(0.06, "standard deviation of the initial weights")
    layernorm_epsilon: Annotated[float, Field(gt=0)] = key(1e-5, "epsilon of RMSNorm")
    make_vocab_size_divisible_by: Positive = key(
        128, "the embedding is padded to a multiple of this and of TP"
    )
    precision: Precision = key(
        "fp32",
        "precision of matrix products; all but fp32 keep bf16 weights and fp32 main weights. fp8_delayed, "
        "fp8_current (one scale a tensor) and fp8_blockwise need a Hopper GPU, and compute routed experts "
        "with a scale for each token; nvfp4 needs a Blackwell",
    )
    bf16_layers_at_end: Count = key(
        0, "layers at the end that stay in bf16 under fp8 and nvfp4; Nemotron 3 Super's recipe: 14"
    )

    @property
    def layers(self) -> str:
        """The letters of all layers; the depths of multi-token prediction share theirs."""
        return self.hybrid_layer_pattern + (self.mtp_hybrid_layer_pattern if self.mtp_num_layers else "")

    @property
    def routed_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers.count("E")


class Optimizer(Section):
    """AdamW and its learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = key(3e-3, "maximum learning rate")
    min_learning_rate: Annotated[float, Field(ge=0)] = key(3e-5, "learning rate at the end of the decay")
    weight_decay: Annotated[float, Field(ge=0)] = key(0.1, "decoupled weight decay")
    adam_beta1: Fraction = key(0.9, "decay of the first moment")
    adam_beta2: Fraction = key(0.95, "decay of the second moment")
    adam_eps: Annotated[float, Field(gt=0)] = key(1e-8, "epsilon of Adam")
    clip_grad: Annotated[float, Field(ge=0)] = key(1.0, "limit of the global gradient norm; 0 turns it off")
    gradient_precision: Literal["fp32", "bf16"] = key(
        "fp32",
        "precision of gradients while micro-batches and processes add them up; bf16 saves 2 bytes a "
        "parameter",
    )
    moment_precision: Literal["fp32", "bf16"] = key(
        "fp32",
        "precision of Adam's two moments; bf16 saves 6 bytes a parameter, over data parallelism. Needs a GPU",
    )


# The key of a training and of an evaluation.
CpusPerTask = Annotated[
    Positive,
    Field(
        description="CPU threads of a process; another number may change the last bits of a result. The tiny "
        "model is too small to gain from a second one, whose core other jobs can use"
    ),
]
MemGbPerTask = Annotated[float, Field(gt=0, description="memory of the node that a process needs, in GB")]


class Run(Section):
    """How a training is run. None of these keys changes what is trained, so none makes it run again."""

    micro_batch_size: Positive = key(4, "sequences that one process computes at a time; 1 for packed data")
    log_interval: Positive = key(10, "steps between two lines of metrics")
    eval_interval: Positive = key(100, "steps between two validations")
    eval_samples: Positive = key(32, "sequences of a validation, the same ones each time")
    save_interval: Positive = key(100, "steps between two checkpoints: what a killed run loses at most")
    save_in_background: bool | None = key(None, "write checkpoints while the training goes on; null: on GPUs")
    keep_checkpoints: Positive = key(2, "checkpoints kept while training; the newest ones")
    keep_steady: Count = key(
        1,
        "checkpoints kept beside them from before the learning rate falls, one of them from where it begins "
        "to: from the last one a longer training goes on, and ckpt/merged/<phase> averages all",
    )
    steady_interval: Positive | None = key(None, "steps between those checkpoints; null: save_interval")
    cpus_per_task: CpusPerTask = 1
    mem_gb_per_task: MemGbPerTask = 4
    stop_before_limit: Positive = key(
        120, "seconds before a Slurm job's time limit at which it saves and hands over to the next job"
    )
    step_timeout: Positive = key(
        1800,
        "seconds without a step, a validation or a checkpoint after which the processes are taken to hang: "
        "they are killed and started again. The first step may take minutes",
    )
    max_restarts: Count = key(
        3, "starts in a row that may end without a new checkpoint before the training gives up"
    )
    tokens_per_second_per_gpu: Annotated[float, Field(gt=0)] | None = key(
        None,
        "measured or expected throughput, by which a dry-run estimates the time; null: by the estimated step "
        "on cluster.gpu",
    )
    parallel: Parallel = key(Parallel, "how many processes share the model")
    recompute: list[Module] = key(
        list,
        "what the backward pass computes again instead of keeping it; layer: everything, and then alone; "
        "whatever is named, so is Mamba's scan; scan: no more than it",
    )
    offload_optimizer: Annotated[float, Field(ge=0, le=1)] = key(
        0.0, "share of the optimizer's state that stays in host memory and is updated there. Needs a GPU"
    )
    moe_token_dispatcher: Dispatcher | None = key(
        None,
        "what takes tokens to the experts of other processes. alltoall: NCCL, a token once for each of its "
        "experts; allgather: NCCL, a token once to each process that shares experts; null: allgather on one "
        "node where no more processes share experts than a token has, else alltoall; deepep, hybridep: the "
        "kernels of DeepEP or of its branch HybridEP, which need GPUs and the package deep_ep (docs/gpu.md)",
    )
    moe_shared_expert_overlap: bool = key(
        False,
        "compute the expert of all tokens while the others' tokens travel. Needs GPUs, and null as "
        "model.moe_latent_size",
    )


class Phase(Section):
    """One part of the curriculum: it continues the previous phase, on a blend of its own."""

    name: Name = Field(description="directory name below ckpt/pretrain")
    tokens: Positive = Field(description="tokens to train on; rounded up to whole steps")
    blend: list[CorpusWeight] = Field(min_length=1, description="corpora and their weights")
    seed: Seed | None = key(
        None,
        "seed of the order of its text; null: `seed`. Phases of one seed and length read each corpus from "
        "the same beginning, so give later ones another seed, unless they are to see its first text again",
    )
    checkpoint: Text | None = key(
        None,
        "checkpoint from elsewhere that is the result of this phase, in place of training it: what "
        "pretrain.base may name; later phases, SFT and LoRA go on from it; null: the phase is trained",
    )
    seq_length: Positive | None = key(None, "tokens of a sequence; null: pretrain.seq_length")
    global_batch_size: Positive | None = key(None, "sequences of a step; null: pretrain.global_batch_size")
    # What follows, and is null, is as in `pretrain`, or `model` for the precision.
    learning_rate: Annotated[float, Field(gt=0)] | None = key(
        None,
        "a constant rate; null: that of the curriculum, whose warm-up and decay pass over phases with a rate",
    )
    precision: Precision | None = key(None, "precision of matrix products; null: model.precision")
    parallel: Parallel | None = key(None, "parallel sizes; those that are not given are of pretrain.parallel")
    micro_batch_size: Positive | None = key(None, "sequences that one process computes at a time")
    recompute: list[Module] | None = key(None, "what the backward pass computes again")
    offload_optimizer: Share | None = key(None, "share of the optimizer's state in host memory")
    cuda_graphs: bool | None = key(None, "whether kernels are recorded")
    save_interval: Positive | None = key(None, "steps between two checkpoints")
    eval_interval: Positive | None = key(None, "steps between two validations")
    eval_samples: Positive | None = key(None, "sequences of a validation")
    log_interval: Positive | None = key(None, "steps between two lines of metrics")
    mem_gb_per_task: Annotated[float, Field(gt=0)] | None = key(
        None, "memory of the node for a process, in GB"
    )
    tokens_per_second_per_gpu: Annotated[float, Field(gt=0)] | None = key(None, "throughput, for estimates")


def sample_phases() -> list[Phase]:
    def blend(**weights: float) -> list[CorpusWeight]:
        return [CorpusWeight(corpus=c, weight=w) for c, w in weights.items()]

    return [
        Phase(name="broad", tokens=32_000, blend=blend(docs=0.3, code=0.2, packages=0.2, requests=0.3)),
        Phase(name="focused", tokens=16_000, blend=blend(docs=0.2, requests=0.8)),
    ]


class Pretrain(Run):
    base: Text | None = key(
        None,
        "checkpoint whose weights the first phase starts from: a published one (a directory, or OWNER/NAME "
        "of the hub, pinned by scripts/lock_sources.py), one of Megatron (torch_dist) or of this workflow; "
        "null: random weights",
    )
    cuda_graphs: bool | None = key(
        None,
        "null: the kernels of a whole micro-batch are recorded once and started together where one GPU holds "
        "the model, in bf16 also where it holds its share of each layer (TP), and in bf16 those of attention "
        "and Mamba layers where the GPUs of a node share experts (EP) and have the memory; true: those of "
        "attention and Mamba layers, in any layout; false: none are recorded",
    )
    seq_length: Positive = key(256, "tokens of a sequence")
    global_batch_size: Positive = key(4, "sequences of a step, over all processes")
    warmup_tokens: Count = key(4_000, "tokens over which the learning rate rises from 0")
    decay_tokens: Count = key(
        16_000, "tokens at the end of all phases over which it falls by 1 - sqrt (the D of WSD)"
    )
    merge_tokens: Positive | None = key(
        None,
        "tokens before the learning rate falls over which ckpt/merged/<phase> averages the checkpoints that "
        "keep_steady keeps, as a decay over them would have; null: all of these",
    )
    optimizer: Optimizer = key(Optimizer, "AdamW and its learning rate")
    phases: list[Phase] = Field(
        default_factory=sample_phases, min_length=1, description="the curriculum, in order"
    )

    def steps(self, phase: Phase) -> tuple[int, int, int]:
        """(train_iters, global_batch_size, seq_length) of a phase; tokens are rounded up to whole steps."""
        batch = phase.global_batch_size or self.global_batch_size
        length = phase.seq_length or self.seq_length
        return math.ceil(phase.tokens / (batch * length)), batch, length

    def spans(self) -> list[tuple[int, int]]:
        """First token and end of each phase, counted over the phases that follow the schedule.

        A phase with a constant learning rate has no length there.
        """
        spans, start = [], 0
        for phase in self.phases:
            length = 0 if phase.learning_rate else math.prod(self.steps(phase))
            spans.append((start, start + length))
            start += length
        return spans


class Tuning(Run):
    """What full fine-tuning and LoRA share."""

    base: Text | None = key(
        None,
        "checkpoint to tune: a published one (a directory, or OWNER/NAME of the hub, pinned by "
        "scripts/lock_sources.py), one of Megatron (torch_dist) or of this workflow; null: that of the last "
        "phase of pretraining",
    )
    micro_batch_size: Literal[1] = key(
        1, "packs that one process computes at a time: packed sequences need 1"
    )
    cuda_graphs: Literal[False] | None = key(
        None,
        "null: the kernels of a whole pack are recorded once and started together where one GPU holds the "
        "model, or its share of each layer (TP), but not in fp8_blockwise; false: none are recorded",
    )
    precision: Precision | None = key(None, "precision of matrix products; null: model.precision")
    train_iters: Positive = key(320, "steps")
    global_batch_size: Positive = key(1, "packs of a step, over all processes")
    loss_average: Literal["token", "sample"] = key(
        "token",
        "what a step minimizes: the mean over its trained tokens; or each conversation's own mean, averaged "
        "over its conversations. Multi-token prediction likewise",
    )
    switch_loss_average_after: Count | None = key(
        None,
        "steps after which the loss is averaged the other way (Nemotron 3 Super: first by token, then by "
        "sample); null: never",
    )
    warmup_iters: Count = key(
        10, "steps over which the learning rate rises from 0; then it falls as a cosine"
    )
    # A weight decay of 0.1 left the tiny model a higher loss of held-out calls after each of three seeds
    # (docs/measurements.md).
    optimizer: Optimizer = key(
        lambda: Optimizer(learning_rate=3e-3, min_learning_rate=1e-4, weight_decay=0.0),
        "AdamW and its learning rate",
    )
    # As many steps as the blend takes to come round, so that each line has packs of all sources.
    log_interval: Positive = key(50, "steps between two lines of metrics")
    eval_interval: Positive = key(160, "steps between two validations")
    eval_samples: Positive = key(16, "packs of a validation, the same ones each time")
    save_interval: Positive = key(160, "steps between two checkpoints: what a killed run loses at most")
    num_samples: Count = key(
        40,
        "held-out prompts that the model answers before, during and after the training: answers/ of the "
        "version",
    )
    sample_interval: Positive | None = key(
        None, "steps between two rounds of answers; null: only before the first and after the last step"
    )
    sample_tokens: Positive = key(64, "tokens of such an answer at most")


class Sft(Tuning):
    blend: list[SourceWeight] = Field(
        default_factory=lambda: [
            SourceWeight(source="questions", weight=0.02),
            SourceWeight(source="tools", weight=0.98),
        ],
        min_length=1,
        description="chat sources and their weights",
    )


RANK = "rows of A and columns of B; on GPUs a multiple of 8 is fastest"
EXPERT_RANK = "rank of the routed experts' adapters, of which there are many; null: rank"
ALPHA = "scale of all adapters: their output times alpha / rank"


class Adapters(Section):
    """Low-rank adapters: W x becomes W x + alpha / rank * B A x, with W frozen."""

    rank: Positive = key(8, RANK)
    expert_rank: Positive | None = key(None, EXPERT_RANK)
    alpha: Annotated[float, Field(gt=0)] = key(16, ALPHA)
    dropout: Fraction = key(0.0, "share of an adapter's inputs that a step of training leaves out")
    target_modules: list[Text] = key(
        lambda: ["linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"],
        "names of the linear layers to adapt, or their last parts: linear_fc1 and linear_fc2 of dense "
        "layers, shared and routed experts (experts.linear_fc1: of routed ones alone), fc1_latent_proj, "
        "fc2_latent_proj, router, eh_proj; * stands for anything: decoder.*.linear_fc1 leaves out "
        "multi-token prediction",
    )


class Lora(Tuning, Adapters):
    # The base of the sample has seen 48 steps: of 37 held-out calls, rank 16 gives 1 after 480 steps, rank 64
    # gives 9, and 35 after 1,200. A real model learns with a rank of 8 to 64.
    rank: Positive = key(64, RANK)
    expert_rank: Positive | None = key(8, EXPERT_RANK)
    alpha: Annotated[float, Field(gt=0)] = key(64, ALPHA)
    train_iters: Positive = key(1200, "steps")
    optimizer: Optimizer = key(
        lambda: Optimizer(learning_rate=5e-3, min_learning_rate=1e-4, weight_decay=0.0),
        "AdamW and its learning rate: of a real model about ten times that of full fine-tuning",
    )
