"""The configuration: one model, every key with its default, unit and how to choose it.

`config/config.yaml` and `config/schema.json` are generated from these classes (`config_files`), and the
Snakefile checks what the user gives with `load`.
Nothing heavier than pydantic is imported here: every Slurm job parses the Snakefile.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

ENVIRONMENT_PREFIX = "SNAKETRON_"

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise", "nvfp4"]
Module = Literal["layer", "core_attn", "layernorm", "mlp", "moe", "shared_experts"]


class ConfigError(ValueError):
    """The configuration is wrong; the message names each path and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def key(default: Any, description: str) -> Any:
    """A configuration key; a callable default builds a list or a section."""
    if callable(default):
        return Field(default_factory=default, description=description)
    return Field(default, description=description)


# ------------------------------------------------------------------------------------------ sources


class Hub(Section):
    """A data set of the Hugging Face hub. The lock file pins its commit and files."""

    repository: str = Field(description="owner/name of the data set")
    configuration: str | None = key(
        None, "its configuration, by its exact name; null: the only one, or the default one"
    )
    split: str = key("train", "its split, by its exact name")
    revision: str = key("main", "branch, tag or commit that lock_sources pins")


class Source(Section):
    """Rows from files: of this machine, or of elsewhere and then listed in the lock file."""

    name: Name = Field(description="directory name of what is made from it")
    paths: list[str] = key(
        list,
        "files, directories or globs: .jsonl or .json (also .gz, .zst), .parquet, .arrow; or addresses "
        "(s3://, gs://, hf://, https://), which scripts/lock_sources.py lists",
    )
    hub: Hub | None = key(None, "a data set of the Hugging Face hub, in place of `paths`")
    where: dict[str, list[str | int | bool]] = key(
        dict, "keep only rows whose field is, or is a list that holds, one of these values"
    )
    max_files: Positive | None = key(
        None, "use only so many files, the first ones; the others are not even downloaded; null: all"
    )
    max_documents: Positive | None = key(
        None, "take so many documents of the first files and no more, to try things out; null: all"
    )
    max_tokens: Positive | None = key(
        None, "take whole documents of the first files up to so many tokens; null: all"
    )
    metadata_fields: list[str] = key(list, "columns or JSON keys to keep beside the tokens")

    @property
    def limited(self) -> bool:
        """Whether only the beginning of the source is used."""
        return self.max_documents is not None or self.max_tokens is not None


# Options that each filter takes; they are the arguments of datatrove's class of that name.
FILTERS: dict[str, tuple[str, ...]] = {
    "gopher_quality": (
        "min_doc_words",
        "max_doc_words",
        "min_avg_word_length",
        "max_avg_word_length",
        "max_symbol_word_ratio",
        "max_bullet_lines_ratio",
        "max_ellipsis_lines_ratio",
        "max_non_alpha_words_ratio",
        "min_stop_words",
        "stop_words",
        "language",
    ),
    "gopher_repetition": (
        "dup_line_frac",
        "dup_para_frac",
        "dup_line_char_frac",
        "dup_para_char_frac",
        "top_n_grams",
        "dup_n_grams",
        "language",
    ),
    "c4_quality": (
        "split_paragraph",
        "remove_citations",
        "filter_no_terminal_punct",
        "min_num_sentences",
        "min_words_per_line",
        "max_word_length",
        "filter_lorem_ipsum",
        "filter_javascript",
        "filter_curly_bracket",
        "filter_policy",
        "language",
    ),
    "fineweb_quality": (
        "line_punct_thr",
        "line_punct_exclude_zero",
        "stop_chars",
        "short_line_thr",
        "short_line_length",
        "char_duplicates_ratio",
        "new_line_ratio",
        "language",
    ),
    "language": ("model", "languages", "language_threshold"),
    "regex": ("pattern",),
}


class Filter(Section):
    """One of datatrove's filters."""

    name: Literal[
        "gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality", "language", "regex"
    ] = Field(description="which; `regex` removes documents in which `pattern` is found")
    options: dict[str, Any] = key(
        dict,
        "arguments of datatrove's filter, those not given as it has them; `language` needs `model`, the path "
        "of a fastText model, and `languages`",
    )


class Curation(Section):
    """What is removed from a corpus before it is tokenized, in this order."""

    filters: list[Filter] = key(list, "filters of single documents, in order")
    exact_dedup: Name | None = key(
        None,
        "name of a group of corpora: of documents with the same text, the first stays, in the order of "
        "the corpora; null: no exact de-duplication",
    )
    minhash_dedup: Name | None = key(
        None, "name of a group of corpora: of documents with nearly the same text, one stays"
    )
    decontaminate: bool = key(False, "remove documents that share an n-gram with `curation.evaluation`")
    pii: bool = key(False, "replace e-mail and public IP addresses")


class Corpus(Source):
    """One pretraining corpus: raw files of one kind, tokenized once and shared by every phase."""

    text_field: str = key("text", "column or JSON key that holds the document")
    curation: Curation | None = key(None, "what is removed before it is tokenized; null: nothing")


class ChatSource(Source):
    """One source of conversations in the OpenAI message format."""

    messages_field: str = key("messages", "column or JSON key that holds the list of messages")
    tools_field: str = key(
        "tools", "column or JSON key that holds the tool definitions; may be absent in a row"
    )


class CorpusWeight(Section):
    corpus: str = Field(description="name of a corpus")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="share of the mix, relative to the other weights"
    )


class SourceWeight(Section):
    source: str = Field(description="name of a chat source")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="share of the mix, relative to the other weights"
    )


def sample_paths(name: str, count: int) -> list[str]:
    return [f"data/sample/{name}/part_{i}.jsonl" for i in range(count)]


def sample_corpora() -> list[Corpus]:
    return [
        Corpus(name="docs", paths=sample_paths("docs", 3)),
        Corpus(name="code", paths=sample_paths("code", 3)),
        Corpus(name="packages", paths=sample_paths("packages", 3)),
    ]


def sample_chats() -> list[ChatSource]:
    return [
        ChatSource(name="questions", paths=sample_paths("questions", 2)),
        ChatSource(name="tools", paths=sample_paths("tools", 2)),
    ]


class Tokenizer(Section):
    path: str | None = key(
        None, "directory or hub id of a Hugging Face tokenizer to use; null trains one from `text`"
    )
    chat_template: str | None = key(
        "config/chat_template.jinja",
        "Jinja file saved with the tokenizer; null keeps the template that comes with `path`",
    )
    vocab_size: Positive = key(
        2048, "tokens of a trained tokenizer, special ones included; 32k to 131k for a real model"
    )
    text: list[str] = key(
        lambda: [p for c in sample_corpora() for p in c.paths],
        "files that a new tokenizer is trained on (no globs: a file that joins a corpus later must not "
        "change the tokenizer); edit it, or run with `-R build_tokenizer`, to ask for a new one",
    )
    text_field: str = key("text", "column or JSON key of those files that holds the document")


class MinHash(Section):
    """Near-duplicates: two documents are compared by hashes of their n-grams (datatrove's MinHash)."""

    n_grams: Positive = key(5, "words of an n-gram")
    num_buckets: Positive = key(14, "buckets; documents that agree in all hashes of one are duplicates")
    hashes_per_bucket: Positive = key(
        8, "hashes of a bucket; 14 x 8 finds a similarity of 0.75 in 77 % and one of 0.8 in 92 % of the cases"
    )


class CurationData(Section):
    """What the curation of all corpora shares. A corpus is curated only where it says so."""

    minhash: MinHash = key(MinHash, "how near-duplicates are found")
    evaluation: list[str] = key(
        list, "files with the texts of evaluations, for `decontaminate`: the same formats as a corpus"
    )
    evaluation_field: str = key("text", "column or JSON key of those files that holds the text")
    decontamination_n_grams: Positive = key(12, "words of an n-gram that must not be shared")
    num_examples: Count = key(3, "examples of removed documents to keep for each reason and file")


class Shards(Section):
    shard_size: Positive | None = key(
        None,
        "bytes: raw files of a source are put together, by name, until a shard has so many, and each shard "
        "is one job; null: each file is a shard. A job costs up to two seconds beside its work, so "
        "1_000_000_000 is a good size for many small files",
    )


class PretrainData(Shards):
    valid_fraction: Fraction = key(
        0.01, "share of the documents held out for validation, by a hash of the text"
    )
    test_fraction: Fraction = key(0.01, "share of the documents held out for the test, by a hash of the text")
    document_order: Literal["kept", "shuffled"] = key(
        "kept", "order of the documents of a shard: as in the raw files, or shuffled by the seed"
    )
    max_document_tokens: Annotated[int, Field(ge=2)] | None = key(
        None, "tokens of a document, its end included, above which it is `long`; null: any length"
    )
    long_documents: Literal["cut", "drop"] = key(
        "cut", "cut a long document into several ones of at most so many tokens, or drop and count it"
    )
    bad_rows: Literal["fail", "drop"] = key(
        "fail",
        "a row that cannot be read (invalid JSON, no text, a line that is too long): stop, or drop it and "
        "count it",
    )
    invalid_text: Literal["fail", "replace", "drop"] = key(
        "fail",
        "text that is not valid Unicode (lone surrogates, invalid UTF-8): stop, put U+FFFD in place of what "
        "is invalid, or drop and count the document. NUL is valid and stays",
    )
    max_line_bytes: Positive = key(
        50_000_000, "bytes of a row above which it is a bad row; a job takes up to 20 times as much memory"
    )
    max_dropped_fraction: Fraction = key(
        0.01, "share of bad or invalid rows of a shard above which it fails in spite of `drop`"
    )
    max_epochs: Annotated[float, Field(gt=0)] = key(
        4.0, "warn when a phase repeats a corpus more often (above about 4, repeated tokens are worth less)"
    )
    cpus_per_task: Positive = key(1, "CPU threads of a job that tokenizes; the result is the same")


class SftData(Shards):
    valid_fraction: Fraction = key(
        0.04, "share of the conversations held out for validation, by a hash of the text"
    )
    test_fraction: Fraction = key(
        0.02, "share of the conversations held out for the test, by a hash of the text"
    )
    pack_size: Positive = key(
        1024, "tokens of a pack, and the sequence length of SFT; longer conversations are dropped and counted"
    )
    algorithm: Literal["first_fit_decreasing", "first_fit_shuffle", "concatenative"] = key(
        "first_fit_decreasing",
        "how conversations are packed: tightly, longest first; first fit in an order shuffled by the seed; "
        "or in order and only as far as the next one fits",
    )
    pack_across_shards: bool = key(
        False, "pack all shards of a source in one job, for fuller packs when a shard fills only a few"
    )


# -------------------------------------------------------------------------------------------- model


class Model(Section):
    """The architecture, in megatron-core's names. The default has 1.8 million parameters."""

    hybrid_layer_pattern: Annotated[str, Field(pattern=r"^[ME*\-]+$")] = key(
        "MEM*EME", "one letter a layer: M Mamba-2, E mixture of experts, * attention, - dense MLP"
    )
    hidden_size: Positive = key(128, "width of the residual stream")
    ffn_hidden_size: Positive = key(256, "inner width of a dense MLP layer (-)")
    num_attention_heads: Positive = key(8, "query heads of an attention layer")
    num_query_groups: Positive = key(2, "key and value heads (grouped-query attention)")
    kv_channels: Positive = key(16, "width of an attention head")
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
    moe_router_topk_scaling_factor: float = key(2.5, "factor on the routed experts' output")
    moe_aux_loss_coeff: float = key(1e-4, "weight of the router's load balancing loss")
    moe_router_bias_update_rate: float = key(
        1e-3, "step of the expert bias towards an even load, a step of training"
    )
    mtp_num_layers: Count = key(2, "depths of multi-token prediction; they share one block. 0 turns it off")
    mtp_hybrid_layer_pattern: Annotated[str, Field(pattern=r"^[ME*\-]+$")] = key(
        "*E", "layers of the multi-token prediction block"
    )
    mtp_loss_scaling_factor: float = key(0.3, "weight of the multi-token prediction loss")
    init_method_std: float = key(0.02, "standard deviation of the initial weights")
    layernorm_epsilon: float = key(1e-5, "epsilon of RMSNorm")
    make_vocab_size_divisible_by: Positive = key(
        128, "the embedding is padded to a multiple of this and of TP"
    )
    precision: Precision = key(
        "fp32",
        "of products; all but fp32 keep bf16 weights and fp32 main weights. fp8_delayed, fp8_current (one "
        "scale a tensor) and fp8_blockwise need a Hopper GPU, nvfp4 a Blackwell",
    )
    bf16_layers_at_end: Count = key(
        0, "layers at the end that stay in bf16 under fp8 and nvfp4; Nemotron 3 Super's recipe: 14"
    )


class Parallel(Section):
    """How many processes share a model. Changing it continues the same training."""

    tensor_model_parallel_size: Positive = key(
        1, "processes that share each layer (with sequence parallelism)"
    )
    pipeline_model_parallel_size: Positive = key(1, "processes that hold consecutive layers")
    context_parallel_size: Positive = key(1, "processes that share each sequence")
    expert_model_parallel_size: Positive = key(1, "processes that share the routed experts")
    expert_tensor_parallel_size: Positive = key(1, "processes that share each routed expert")
    data_parallel_size: Positive = key(1, "copies of the model, each with its part of the global batch")

    @property
    def world_size(self) -> int:
        """Number of processes (GPUs) of the job."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )


class Cluster(Section):
    """The nodes that trainings run on. The site's names (partition, account, limits) are the profile's."""

    gpus_per_node: Count = key(0, "GPUs of a node, one process each; 0: trainings run on CPUs")
    tasks_per_node: Positive | None = key(
        None,
        "processes of a training on a node; null: one for each GPU, or all on one node where there are none",
    )
    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = key(
        None,
        "memory of a GPU (10^9 bytes); a training whose weights, gradients and optimizer alone need more is "
        "an error of the dry-run; null: not checked",
    )
    container: str | None = key(
        None, "image that the processes of a training run in (envs/); null: the environment of the workflow"
    )
    container_runtime: Literal["apptainer", "pyxis"] = key(
        "apptainer", "what starts the image: `apptainer exec`, or srun's --container-image (pyxis and enroot)"
    )
    mounts: list[str] = key(
        list,
        "paths of the host that the image sees beside the working directory: `path` or `path:path_inside`",
    )
    cache_dir: str | None = key(
        None,
        "directory on a disk of each node for compiled kernels, kept from job to job; null: below $TMPDIR",
    )
    environment: dict[str, str] = key(
        dict, "variables of the environment of a training's processes, over our defaults (docs/slurm.md)"
    )
    secrets_file: str | None = key(
        None, "file of mode 600 with lines NAME=value, such as WANDB_API_KEY, for the trainings alone"
    )


# ------------------------------------------------------------------------------------------ training


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
        "fp32", "of gradients while micro-batches and processes add them up; bf16 saves 2 bytes a parameter"
    )
    moment_precision: Literal["fp32", "bf16"] = key(
        "fp32",
        "of Adam's two moments; bf16 saves 6 bytes a parameter, over data parallelism. Needs a GPU",
    )


class Run(Section):
    """How a training is run. None of these keys changes what is trained, so none makes it run again."""

    micro_batch_size: Positive = key(4, "sequences that one process computes at a time; 1 for packed data")
    log_interval: Positive = key(10, "steps between two lines of metrics")
    eval_interval: Positive = key(100, "steps between two validations")
    eval_samples: Positive = key(32, "sequences of a validation, the same ones each time")
    save_interval: Positive = key(100, "steps between two checkpoints: what a killed run loses at most")
    save_in_background: bool | None = key(None, "write checkpoints while the training goes on; null: on GPUs")
    keep_checkpoints: Positive = key(2, "checkpoints kept while training; the newest ones")
    cpus_per_task: Positive = key(
        2, "CPU threads of a process; another number may change the last bits of a result"
    )
    mem_gb_per_task: Annotated[float, Field(gt=0)] = key(4, "memory of the node that a process needs, in GB")
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
        None, "measured or expected throughput, from which a dry-run estimates the time; null: no estimate"
    )
    parallel: Parallel = key(Parallel, "how many processes share the model")
    recompute: list[Module] = key(
        list, "what the backward pass computes again instead of keeping it; layer: everything, and then alone"
    )
    offload_optimizer: Annotated[float, Field(ge=0, le=1)] = key(
        0.0, "share of the optimizer's state that stays in host memory and is updated there. Needs a GPU"
    )


class Phase(Section):
    """One part of the pretraining curriculum, from the previous phase's last step on its own blend."""

    name: Name = Field(description="directory name below ckpt/pretrain")
    tokens: Positive = Field(description="tokens to train on; rounded up to whole steps")
    blend: list[CorpusWeight] = Field(min_length=1, description="corpora and their weights")
    seq_length: Positive | None = key(None, "tokens of a sequence; null: pretrain.seq_length")
    global_batch_size: Positive | None = key(None, "sequences of a step; null: pretrain.global_batch_size")


def sample_phases() -> list[Phase]:
    def blend(**weights: float) -> list[CorpusWeight]:
        return [CorpusWeight(corpus=c, weight=w) for c, w in weights.items()]

    return [
        Phase(name="broad", tokens=200_000, blend=blend(docs=0.3, code=0.4, packages=0.3)),
        Phase(name="focused", tokens=80_000, blend=blend(docs=0.7, packages=0.3)),
    ]


class Pretrain(Run):
    cuda_graphs: bool = key(
        False,
        "record the kernels of each layer once and start them together: a sixth faster on one H200 at "
        "micro-batch 4, for more memory. Needs a GPU",
    )
    seq_length: Positive = key(256, "tokens of a sequence")
    global_batch_size: Positive = key(4, "sequences of a step, over all processes")
    warmup_tokens: Count = key(20_000, "tokens over which the learning rate rises from 0")
    decay_tokens: Count = key(
        80_000, "tokens at the end of the last phase over which it falls by 1 - sqrt (the D of WSD)"
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
        """First token and end of each phase, counted over the whole curriculum."""
        spans, start = [], 0
        for phase in self.phases:
            spans.append((start, start + math.prod(self.steps(phase))))
            start = spans[-1][1]
        return spans


class Sft(Run):
    micro_batch_size: Literal[1] = key(
        1, "packs that one process computes at a time: packed sequences need 1"
    )
    train_iters: Positive = key(100, "steps")
    global_batch_size: Positive = key(2, "packs of a step, over all processes")
    warmup_iters: Count = key(
        10, "steps over which the learning rate rises from 0; then it falls as a cosine"
    )
    optimizer: Optimizer = key(
        lambda: Optimizer(learning_rate=1e-3, min_learning_rate=1e-4), "AdamW and its learning rate"
    )
    eval_samples: Positive = key(16, "packs of a validation, the same ones each time")
    blend: list[SourceWeight] = Field(
        default_factory=lambda: [SourceWeight(source=s.name, weight=0.5) for s in sample_chats()],
        min_length=1,
        description="chat sources and their weights",
    )
    num_samples: Count = key(2, "answers of the base and of the tuned model to keep in the summary")
    sample_tokens: Positive = key(48, "tokens of such an answer at most")


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


class Config(Section):
    pathvars: dict[Literal["data", "ckpt", "logs", "benchmarks"], str] = key(
        lambda: {"data": "data", "ckpt": "ckpt"},
        "roots of the outputs; move them to a parallel file system here",
    )
    seed: Count = key(1234, "seed of initial weights, shuffling and sampling")
    tracking: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)] = key(
        "off",
        "Weights & Biases: off, offline (below ./wandb, for `wandb sync`) or online (needs WANDB_API_KEY)",
    )
    tokenizer: Tokenizer = key(Tokenizer, "trained from text, or taken from a path")
    sources_lock: str = key(
        "sources.lock.json", "what scripts/lock_sources.py writes: the files of sources that lie elsewhere"
    )
    corpora: list[Corpus] = Field(default_factory=sample_corpora, description="text for pretraining")
    curation: CurationData = key(CurationData, "what the curation of all corpora shares")
    pretrain_data: PretrainData = key(PretrainData, "from raw text to tokens")
    model: Model = key(Model, "the architecture")
    cluster: Cluster = key(Cluster, "the nodes that trainings run on")
    pretrain: Pretrain = key(Pretrain, "pretraining")
    chats: list[ChatSource] = Field(default_factory=sample_chats, description="conversations for SFT")
    sft_data: SftData = key(SftData, "from conversations to packs")
    sft: Sft = key(Sft, "supervised fine-tuning")

    @model_validator(mode="after")
    def check(self) -> Self:
        """Everything that one key alone cannot show, with both numbers in the message."""
        problems = [
            *_duplicates("corpora", [c.name for c in self.corpora]),
            *_duplicates("chats", [c.name for c in self.chats]),
            *_duplicates("pretrain.phases", [p.name for p in self.pretrain.phases]),
            *_check_references(self),
            *_check_sources(self),
            *_check_tokenizer(self.tokenizer),
            *_check_model(self.model),
            *_check_run("pretrain", self.pretrain, self.model),
            *_check_run("sft", self.sft, self.model),
            *_check_nodes("pretrain", self.pretrain, self.cluster),
            *_check_nodes("sft", self.sft, self.cluster),
            *_check_environment(self.cluster),
            *_check_batches(self),
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        return self


def _duplicates(path: str, names: list[str]) -> list[str]:
    return [
        f"{path}: the name {name!r} is used twice"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]


def _check_references(config: Config) -> list[str]:
    corpora, sources = {c.name for c in config.corpora}, {c.name for c in config.chats}
    used = [
        (f"pretrain.phases[{i}].blend[{j}].corpus", entry.corpus, corpora)
        for i, phase in enumerate(config.pretrain.phases)
        for j, entry in enumerate(phase.blend)
    ] + [(f"sft.blend[{j}].source", entry.source, sources) for j, entry in enumerate(config.sft.blend)]
    return [
        f"{path}: {name!r} is not defined{_suggest(name, known)}"
        for path, name, known in used
        if name not in known
    ]


RESERVED = ("split", "sequence", "file", "row", "tokens", "text", "input_ids", "loss_mask")  # our columns


def _check_sources(config: Config) -> list[str]:
    problems = []
    sources = [(f"corpora[{i}]", c) for i, c in enumerate(config.corpora)]
    sources += [(f"chats[{i}]", c) for i, c in enumerate(config.chats)]  # type: ignore[misc]
    for at, source in sources:
        if bool(source.paths) == bool(source.hub):
            problems.append(f"{at} ({source.name}): give either paths or hub")
        problems += [
            f"{at}.metadata_fields: {name!r} is the name of a column of ours; leave it out"
            for name in source.metadata_fields
            if name in RESERVED
        ]
    for i, corpus in enumerate(config.corpora):
        curation = corpus.curation or Curation()
        if curation.decontaminate and not config.curation.evaluation:
            problems.append(
                f"corpora[{i}].curation.decontaminate: name the texts to protect in curation.evaluation"
            )
        for j, entry in enumerate(curation.filters):
            at, known = f"corpora[{i}].curation.filters[{j}].options", FILTERS[entry.name]
            problems += [
                f"{at}.{name}: unknown option of {entry.name}{_suggest(name, set(known))}"
                for name in entry.options
                if name not in known
            ]
            needed = {"language": ("model", "languages"), "regex": ("pattern",)}.get(entry.name, ())
            problems += [
                f"{at}.{name}: {entry.name} needs it" for name in needed if name not in entry.options
            ]
            if entry.name == "regex":
                try:
                    re.compile(str(entry.options.get("pattern", "")))
                except re.error as error:
                    problems.append(f"{at}.pattern: not a regular expression ({error})")
    return problems


def _check_tokenizer(tokenizer: Tokenizer) -> list[str]:
    if not tokenizer.path and not tokenizer.chat_template:
        return ["tokenizer.chat_template: null needs tokenizer.path, which the template would come from"]
    if not tokenizer.path and not tokenizer.text:
        return ["tokenizer.text: name the files to train a tokenizer on, or give tokenizer.path"]
    return []


def _check_model(model: Model) -> list[str]:
    checks = [
        ("num_attention_heads", "num_query_groups"),
        ("mamba_num_heads", "mamba_num_groups"),
    ]
    problems = [_divides(f"model.{a}", getattr(model, a), f"model.{b}", getattr(model, b)) for a, b in checks]
    if model.moe_router_topk > model.num_moe_experts:
        problems.append(
            f"model.moe_router_topk {model.moe_router_topk} is more than "
            f"model.num_moe_experts {model.num_moe_experts}"
        )
    return [p for p in problems if p]


def _check_run(section: str, run: Pretrain | Sft, model: Model) -> list[str]:
    """Parallel sizes against the model; the rules are megatron-core's."""
    parallel, at = run.parallel, f"{section}.parallel"
    tp, ep, etp = (
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    stages = parallel.pipeline_model_parallel_size
    shared = ["num_attention_heads", "mamba_num_heads", "mamba_num_groups"]
    if model.num_query_groups >= tp:
        shared.append("num_query_groups")
    problems = [
        _divides(f"model.{k}", getattr(model, k), f"{at}.tensor_model_parallel_size", tp) for k in shared
    ]
    if model.num_query_groups < tp:  # each group is then on several processes
        groups = model.num_query_groups
        problems.append(_divides(f"{at}.tensor_model_parallel_size", tp, "model.num_query_groups", groups))
    problems += [
        _divides("model.num_moe_experts", model.num_moe_experts, f"{at}.expert_model_parallel_size", ep),
        _divides(
            "model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, f"{at}.expert_tensor_parallel_size", etp
        ),
        _divides(
            f"the processes of a pipeline stage ({section})",
            parallel.world_size // stages,
            "expert_model_parallel_size x expert_tensor_parallel_size",
            ep * etp,
        ),
        _divides(
            "the layers of model.hybrid_layer_pattern",
            len(model.hybrid_layer_pattern),
            f"{at}.pipeline_model_parallel_size",
            stages,
        )
        if len(model.hybrid_layer_pattern) < stages
        else "",
    ]
    if "layer" in run.recompute and len(run.recompute) > 1:
        problems.append(f"{section}.recompute: layer is everything; leave out the others of {run.recompute}")
    return [p for p in problems if p]


def _check_nodes(section: str, run: Pretrain | Sft, cluster: Cluster) -> list[str]:
    """The processes of a training must fill its nodes."""
    gpus, tasks = cluster.gpus_per_node, cluster.tasks_per_node
    if gpus and tasks and tasks > gpus:
        return [f"cluster.tasks_per_node {tasks} is more than cluster.gpus_per_node {gpus}: each needs a GPU"]
    by = "tasks_per_node" if tasks else "gpus_per_node"
    per_node, processes = tasks or gpus, run.parallel.world_size
    if not per_node or processes <= per_node or processes % per_node == 0:
        return []
    return [
        f"{section}.parallel: {processes} processes do not fill nodes of cluster.{by} {per_node}; "
        f"{processes // per_node * per_node} or {-(-processes // per_node) * per_node} would"
    ]


# Names of variables that hold secrets. The configuration is copied beside checkpoints and to W&B.
SECRET = re.compile(r"(?i)(_|^)(key|token|secret|password|passwd|credentials?)(_|$)")


def _check_environment(cluster: Cluster) -> list[str]:
    return [
        f"cluster.environment.{name}: a secret does not belong in a configuration; set it in the environment "
        "of the command, or name a file of mode 600 in cluster.secrets_file"
        for name in cluster.environment
        if SECRET.search(name)
    ]


def _check_batches(config: Config) -> list[str]:
    pretrain, sft, problems = config.pretrain, config.sft, []
    for i, phase in enumerate(pretrain.phases):
        at = f"pretrain.phases[{i}]" if phase.global_batch_size else "pretrain"
        problems.append(_batch(at, phase.global_batch_size or pretrain.global_batch_size, pretrain))
        at = f"pretrain.phases[{i}]" if phase.seq_length else "pretrain"
        problems.append(
            _sequence(f"{at}.seq_length", phase.seq_length or pretrain.seq_length, pretrain.parallel)
        )
    problems.append(_batch("sft", sft.global_batch_size, sft))
    problems.append(_sequence("sft_data.pack_size", config.sft_data.pack_size, sft.parallel))
    if sft.parallel.context_parallel_size > 1:
        problems.append("sft.parallel.context_parallel_size: packed sequences are trained with 1 only")
    if sft.warmup_iters >= sft.train_iters:
        problems.append(
            f"sft.warmup_iters {sft.warmup_iters} is not less than sft.train_iters {sft.train_iters}"
        )
    for section in ("pretrain_data", "sft_data"):
        data = getattr(config, section)
        if data.valid_fraction + data.test_fraction >= 1:
            problems.append(
                f"{section}: valid_fraction {data.valid_fraction} + test_fraction {data.test_fraction} "
                "leave nothing to train on"
            )
    for section, optimizer in (("pretrain", pretrain.optimizer), ("sft", sft.optimizer)):
        if optimizer.min_learning_rate > optimizer.learning_rate:
            problems.append(
                f"{section}.optimizer.min_learning_rate {optimizer.min_learning_rate} is more than "
                f"learning_rate {optimizer.learning_rate}"
            )
    total = pretrain.spans()[-1][1]
    if pretrain.warmup_tokens + pretrain.decay_tokens > total:
        problems.append(
            f"pretrain.warmup_tokens {pretrain.warmup_tokens} + decay_tokens {pretrain.decay_tokens} "
            f"are more than the {total} tokens of all phases"
        )
    return list(dict.fromkeys(p for p in problems if p))


def _batch(at: str, global_batch_size: int, run: Run) -> str:
    copies = run.parallel.data_parallel_size
    return _divides(
        f"{at}.global_batch_size",
        global_batch_size,
        f"micro_batch_size {run.micro_batch_size} x data_parallel_size {copies} =",
        run.micro_batch_size * copies,
    )


def _sequence(at: str, length: int, parallel: Parallel) -> str:
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    parts = tp * (2 * cp if cp > 1 else 1)  # context parallelism gives each process two chunks
    return _divides(at, length, f"tensor {tp} x context {cp} parallel parts =", parts)


def _divides(name: str, value: int, by_name: str, by: int) -> str:
    return "" if value % by == 0 else f"{name} {value} is not divisible by {by_name} {by}"


# ------------------------------------------------------------------------------------------ loading


def load(values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Config:
    """Check the merged configuration of Snakemake and return it typed.

    `SNAKETRON_SFT__TRAIN_ITERS=10` in the environment sets `sft.train_iters` over every file.
    Raises `ConfigError` with one line for each problem.
    """
    merged = json.loads(json.dumps(values, default=str))  # YAML knows dates, which no key takes
    for name, value in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            _set(merged, name, value)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def _set(values: dict[str, Any], variable: str, text: str) -> None:
    """Set the key that a variable of the environment names to its YAML value."""
    path = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"environment variable {variable}: {text!r} is not YAML") from None
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"environment variable {variable}: {name!r} is not a section")
    values[path[-1]] = value


def _explain(error: Any) -> str:
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggest(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _keys_at(path: tuple[str | int, ...]) -> set[str]:
    """Names of the keys of the section at `path`."""
    section: Any = Config
    for name in path:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        section = next(
            (a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation
        )
    return set(section.model_fields)


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
