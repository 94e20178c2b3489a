"""What one key alone cannot show: each check returns problems, with the paths and both numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from snaketron.config.base import suggest
from snaketron.config.data import FILTERS, Curation, Reasoning, Tokenizer
from snaketron.config.linears import check_names
from snaketron.config.training import Cluster, Model, Parallel, Pretrain, Run, Tuning

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


RESERVED = (  # our columns
    *("split", "sequence", "file", "row", "tokens", "text"),
    *("input_ids", "loss_mask", "turn", "reasoning_mode"),
)


def check_sources(config: Config) -> list[str]:
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


# What the renderer itself gives to a template.
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
    return []


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
    return [p for p in problems if p]


def check_run(section: str, run: Pretrain | Tuning, model: Model) -> list[str]:
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
    if (context := parallel.context_parallel_size) > 1:
        # A Mamba-2 layer then shares its heads, not the sequence; each process has groups of its own or
        # several share one.
        by = f"{at}.tensor_model_parallel_size x context_parallel_size ="
        problems.append(_divides("model.mamba_num_heads", model.mamba_num_heads, by, tp * context))
        groups = max(1, model.mamba_num_groups // tp)
        if max(groups, context) % min(groups, context):
            problems.append(
                f"model.mamba_num_groups {model.mamba_num_groups} / {at}.tensor_model_parallel_size {tp} and "
                f"context_parallel_size {context}: neither divides the other"
            )
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


def check_nodes(section: str, run: Pretrain | Tuning, cluster: Cluster) -> list[str]:
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


def check_environment(cluster: Cluster) -> list[str]:
    return [
        f"cluster.environment.{name}: a secret does not belong in a configuration; set it in the environment "
        "of the command, or name a file of mode 600 in cluster.secrets_file"
        for name in cluster.environment
        if SECRET.search(name)
    ]


def check_batches(config: Config) -> list[str]:
    pretrain, problems = config.pretrain, []
    for i, phase in enumerate(pretrain.phases):
        at = f"pretrain.phases[{i}]" if phase.global_batch_size else "pretrain"
        problems.append(_batch(at, phase.global_batch_size or pretrain.global_batch_size, pretrain))
        at = f"pretrain.phases[{i}]" if phase.seq_length else "pretrain"
        problems.append(
            _sequence(f"{at}.seq_length", phase.seq_length or pretrain.seq_length, pretrain.parallel)
        )
    data = config.sft_data
    if data.padding_multiple:
        at = "sft_data.padding_multiple"
        problems.append(_divides("sft_data.pack_size", data.pack_size, at, data.padding_multiple))
    tunings: dict[str, Tuning] = {"sft": config.sft, "lora": config.lora}
    for name, run in tunings.items():
        problems.append(_batch(name, run.global_batch_size, run))
        problems.append(_sequence("sft_data.pack_size", data.pack_size, run.parallel))
        context = run.parallel.context_parallel_size
        if data.padding_multiple and context > 1:
            by = f"2 x {name}.parallel.context_parallel_size {context} ="
            multiple = run.parallel.sequence_multiple
            problems.append(_divides("sft_data.padding_multiple", data.padding_multiple, by, multiple))
        if run.switch_loss_average_after is not None and run.switch_loss_average_after >= run.train_iters:
            problems.append(
                f"{name}.switch_loss_average_after {run.switch_loss_average_after} is not less than "
                f"{name}.train_iters {run.train_iters}, so it would never switch; leave it out"
            )
        if run.warmup_iters >= run.train_iters:
            problems.append(
                f"{name}.warmup_iters {run.warmup_iters} is not less than "
                f"{name}.train_iters {run.train_iters}"
            )
    for section in ("pretrain_data", "sft_data"):
        data = getattr(config, section)
        if data.valid_fraction + data.test_fraction >= 1:
            problems.append(
                f"{section}: valid_fraction {data.valid_fraction} + test_fraction {data.test_fraction} "
                "leave nothing to train on"
            )
    for section, optimizer in (
        ("pretrain", pretrain.optimizer),
        *((name, run.optimizer) for name, run in tunings.items()),
    ):
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


def check_lora(config: Config) -> list[str]:
    """Whether the targets are there in this model is checked when LoRA is run: others need not know of it."""
    targets = config.lora.target_modules
    return check_names("lora.target_modules", targets) or (
        [] if targets else ["lora.target_modules: name the layers to adapt"]
    )


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
    parts = tp * parallel.sequence_multiple
    return _divides(at, length, f"tensor {tp} x context {cp} parallel parts =", parts)


def _divides(name: str, value: int, by_name: str, by: int) -> str:
    return "" if value % by == 0 else f"{name} {value} is not divisible by {by_name} {by}"
