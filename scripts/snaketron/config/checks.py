"""Checks of several keys together. Each returns problems, with the paths and both numbers."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from snaketron.config.base import suggest
from snaketron.config.data import (
    FILTERS,
    SPECIAL_TOKENS,
    ChatSource,
    Corpus,
    Curation,
    PretrainData,
    Reasoning,
    SftData,
    Tokenizer,
)
from snaketron.config.dispatching import check_dispatcher
from snaketron.config.linears import check_names
from snaketron.config.training import Adapters, Cluster, Model, Parallel, Pretrain, Tuning
from snaketron.config.trainings import Training

if TYPE_CHECKING:
    from snaketron.config import Config


def duplicates(path: str, names: list[str]) -> list[str]:
    return [
        f"{path}: the name {name!r} is used twice"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]


def check_references(config: Config) -> list[str]:
    corpora, sources = {c.name for c in config.corpora}, {c.name for c in config.chats}
    used = [
        (f"pretrain.phases[{i}].blend[{j}].corpus", entry.corpus, corpora)
        for i, phase in enumerate(config.pretrain.phases)
        for j, entry in enumerate(phase.blend)
    ] + [(f"sft.blend[{j}].source", entry.source, sources) for j, entry in enumerate(config.sft.blend)]
    return [
        f"{path}: {name!r} is not defined{suggest(name, known)}"
        for path, name, known in used
        if name not in known
    ]


def check_blends(config: Config) -> list[str]:
    """Each name stands once in a blend, because a mix has one weight for it."""
    blends = [
        (f"pretrain.phases[{i}].blend", [(entry.corpus, entry.weight) for entry in phase.blend])
        for i, phase in enumerate(config.pretrain.phases)
    ]
    blends.append(("sft.blend", [(entry.source, entry.weight) for entry in config.sft.blend]))
    problems = []
    for at, entries in blends:
        for name, number in Counter(name for name, _ in entries).items():
            if number > 1:
                total = sum(weight for other, weight in entries if other == name)
                problems.append(
                    f"{at}: {name!r} stands there {number} times; leave one, with the weight {total:g} of all"
                )
    return problems


RESERVED = (  # columns that the workflow adds to the data
    *("split", "sequence", "file", "row", "tokens", "text"),
    *("input_ids", "loss_mask", "turn", "reasoning_mode"),
)


def check_sources(config: Config) -> list[str]:
    problems = []
    for at, source in config.sources():
        made = "tokens" if isinstance(source, Corpus) else "packs"
        if sum(map(bool, (source.paths, source.hub, source.registered))) != 1:
            problems.append(f"{at} ({source.name}): give one of paths, hub and {made}")
        elif source.registered:
            problems += _without_effect(at, source, made)
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
                f"{at}.{name}: unknown option of {entry.name}{suggest(name, set(known))}"
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


def _without_effect(at: str, source: Corpus | ChatSource, made: str) -> list[str]:
    """The keys of a source that say how its data is made, where it was made elsewhere."""
    return [
        f"{at}.{name}: has no effect on {made} that were made elsewhere; leave it out"
        for name, field in type(source).model_fields.items()
        if name not in ("name", made)
        and getattr(source, name) != field.get_default(call_default_factory=True)
    ]


# Arguments that the renderer itself gives to a template.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def check_reasoning(config: Config) -> list[str]:
    problems = []
    found: list[tuple[str, Reasoning | None, dict[str, object]]] = [
        ("sft_data", config.sft_data.reasoning, config.sft_data.template_arguments)
    ]
    found += [(f"chats[{i}]", c.reasoning, c.template_arguments) for i, c in enumerate(config.chats)]
    for at, modes, arguments in found:
        problems += [
            f"{at}.template_arguments.{name}: not an argument, it comes from the conversation; leave it out"
            for name in _GIVEN
            if name in arguments
        ]
        total = sum((modes.stripped, modes.low_effort, modes.truncated)) if modes else 0
        if modes and total > 1:
            problems.append(
                f"{at}.reasoning: stripped {modes.stripped} + low_effort {modes.low_effort} + truncated "
                f"{modes.truncated} are more than all conversations"
            )
    return problems


def check_tokenizer(tokenizer: Tokenizer) -> list[str]:
    if not tokenizer.path and not tokenizer.chat_template:
        return ["tokenizer.chat_template: null needs tokenizer.path, which the template would come from"]
    if not tokenizer.path and not tokenizer.text:
        return ["tokenizer.text: name the files to train a tokenizer on, or give tokenizer.path"]
    return [] if tokenizer.path else check_vocab_size(tokenizer.vocab_size)


def check_vocab_size(vocab_size: int) -> list[str]:
    """A trained tokenizer has a token for each byte, so that it can write any text."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size >= smallest:
        return []
    return [
        f"tokenizer.vocab_size {vocab_size} has no room for 256 bytes and {len(SPECIAL_TOKENS)} special "
        f"tokens; give at least {smallest}"
    ]


def check_model(model: Model) -> list[str]:
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
    # megatron-core has a number for each layer and each depth, and one of the block's layers takes its own.
    places = len(model.hybrid_layer_pattern) + model.mtp_num_layers
    if model.mtp_num_layers and (at := model.mtp_hybrid_layer_pattern.rfind("E") + 1) > places:
        problems.append(
            f"model.mtp_hybrid_layer_pattern: its layer {at} is an E, and megatron-core records the load of "
            f"{places} layers: those of model.hybrid_layer_pattern, and model.mtp_num_layers "
            f"{model.mtp_num_layers}"
        )
    return [p for p in problems if p]


# Names of variables that hold secrets. The configuration is copied beside checkpoints and to W&B.
SECRET = re.compile(r"(?i)(_|^)(key|token|secret|password|passwd|credentials?)(_|$)")


def check_environment(cluster: Cluster) -> list[str]:
    return [
        f"cluster.environment.{name}: a secret does not belong in a configuration; set it in the environment "
        "of the command, or name a file of mode 600 in cluster.secrets_file"
        for name in cluster.environment
        if SECRET.search(name)
    ]


def check_training(training: Training, config: Config) -> list[str]:
    """The values of one training, against each other, the model and the nodes."""
    return [
        *check_parallel(training),
        *check_nodes(training, config.cluster),
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
    shared = ["num_attention_heads", "mamba_num_heads", "mamba_num_groups"]
    if model.num_query_groups >= tp:
        shared.append("num_query_groups")
    problems = [
        _divides(f"model.{k}", getattr(model, k), f"{at}.tensor_model_parallel_size", tp) for k in shared
    ]
    problems += _check_context(at, model, parallel)
    if model.num_query_groups < tp:  # each group is then on several processes
        groups = model.num_query_groups
        problems.append(_divides(f"{at}.tensor_model_parallel_size", tp, "model.num_query_groups", groups))
    problems += _check_experts(at, training.section, model, parallel)
    if (layers := len(model.hybrid_layer_pattern)) < stages:
        by = f"{at}.pipeline_model_parallel_size"
        problems.append(_divides("the layers of model.hybrid_layer_pattern", layers, by, stages))
    if "layer" in run.recompute and len(run.recompute) > 1:
        others = f"layer is everything; leave out the others of {run.recompute}"
        problems.append(f"{training.at('recompute')}: {others}")
    return [p for p in problems if p]


def _check_context(at: str, model: Model, parallel: Parallel) -> list[str]:
    """Under context parallelism the processes share the heads of a Mamba-2 layer, not the sequence.

    Each process then has groups of its own, or several processes share one.
    """
    tp, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if context == 1:
        return []
    by = f"{at}.tensor_model_parallel_size x context_parallel_size ="
    problems = [_divides("model.mamba_num_heads", model.mamba_num_heads, by, tp * context)]
    groups = max(1, model.mamba_num_groups // tp)
    if max(groups, context) % min(groups, context):
        problems.append(
            f"model.mamba_num_groups {model.mamba_num_groups} / {at}.tensor_model_parallel_size {tp} and "
            f"context_parallel_size {context}: neither divides the other"
        )
    return problems


def _check_experts(at: str, section: str, model: Model, parallel: Parallel) -> list[str]:
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    width, processes = model.moe_ffn_hidden_size, parallel.world_size // parallel.pipeline_model_parallel_size
    return [
        _divides("model.num_moe_experts", model.num_moe_experts, f"{at}.expert_model_parallel_size", ep),
        _divides("model.moe_ffn_hidden_size", width, f"{at}.expert_tensor_parallel_size", etp),
        _divides(
            f"the processes of a pipeline stage ({section})",
            processes,
            "expert_model_parallel_size x expert_tensor_parallel_size",
            ep * etp,
        ),
    ]


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


def check_batches(training: Training, padding_multiple: int | None) -> list[str]:
    """Sequences and batches are cut into equal parts."""
    run, parallel = training.run, training.run.parallel
    copies, tp = parallel.data_parallel_size, parallel.tensor_model_parallel_size
    context, multiple = parallel.context_parallel_size, parallel.sequence_multiple
    problems = [
        _divides(
            training.at("global_batch_size"),
            training.global_batch_size,
            f"micro_batch_size {run.micro_batch_size} x data_parallel_size {copies} =",
            run.micro_batch_size * copies,
        ),
        _divides(
            training.at("seq_length"),
            training.seq_length,
            f"tensor {tp} x context {context} parallel parts =",
            tp * multiple,
        ),
    ]
    if training.packed and padding_multiple and context > 1:
        by = f"2 x {training.at('parallel')}.context_parallel_size {context} ="
        problems.append(_divides("sft_data.padding_multiple", padding_multiple, by, multiple))
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


def check_given(pretrain: Pretrain) -> list[str]:
    """A phase whose checkpoint is given is not trained, so nothing before it has an effect on it."""
    given = [i for i, phase in enumerate(pretrain.phases) if phase.checkpoint]
    idle = [f"pretrain.phases[{i}].checkpoint" for i in given[:-1]]
    if given and pretrain.base:
        idle.append("pretrain.base")
    return [
        f"{key}: has no effect, because the checkpoint of pretrain.phases[{given[-1]}] is given; leave it out"
        for key in idle
    ]


def check_curriculum(pretrain: Pretrain) -> list[str]:
    """Warm-up and decay fit into the tokens of all phases."""
    total = pretrain.spans()[-1][1]
    if pretrain.warmup_tokens + pretrain.decay_tokens <= total:
        return []
    return [
        f"pretrain.warmup_tokens {pretrain.warmup_tokens} + decay_tokens {pretrain.decay_tokens} "
        f"are more than the {total} tokens of all phases"
        + (" without a learning_rate of their own" if any(p.learning_rate for p in pretrain.phases) else "")
    ]


def check_splits(config: Config) -> list[str]:
    """Some data is left to train on, and packs have room for whole padded conversations."""
    parts: list[tuple[str, PretrainData | SftData]] = [
        ("pretrain_data", config.pretrain_data),
        ("sft_data", config.sft_data),
    ]
    problems = [
        f"{section}: valid_fraction {data.valid_fraction} + test_fraction {data.test_fraction} "
        "leave nothing to train on"
        for section, data in parts
        if data.valid_fraction + data.test_fraction >= 1
    ]
    pack_size, multiple = config.sft_data.pack_size, config.sft_data.padding_multiple
    if multiple and pack_size % multiple:
        problems.append(_divides("sft_data.pack_size", pack_size, "sft_data.padding_multiple", multiple))
    return problems


def _divides(name: str, value: int, by_name: str, by: int) -> str:
    return "" if value % by == 0 else f"{name} {value} is not divisible by {by_name} {by}"
