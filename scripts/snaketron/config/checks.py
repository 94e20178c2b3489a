"""Checks of several keys together. Each returns problems, with the paths and both numbers.

Those of one training are in `training_checks`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from snaketron.config.base import suggest
from snaketron.config.cluster import Cluster
from snaketron.config.curation import FILTERS, Curation
from snaketron.config.data import (
    SPECIAL_TOKENS,
    ChatSource,
    Corpus,
    PretrainData,
    Reasoning,
    SftData,
    Tokenizer,
)
from snaketron.config.training import Model, Pretrain
from snaketron.config.training_checks import divides

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
        known = config.chats if at == "sft.blend" else config.corpora
        held_out = {source.name: source.split for source in known if not source.trained}
        if all(name in held_out for name, _ in entries):
            said = ", ".join(f"{name!r} is of split {held_out[name]}" for name, _ in entries)
            problems.append(f"{at}: names nothing to train on ({said}); add a source of split train or null")
    return problems


RESERVED = (  # columns that the workflow adds to the data
    *("split", "sequence", "file", "row", "tokens", "text"),
    *("input_ids", "loss_mask", "turn", "reasoning_mode"),
)


def check_sources(config: Config) -> list[str]:
    problems = []
    for at, source in config.sources():
        if sum(map(bool, (source.paths, source.hub, source.registered))) != 1:
            problems.append(f"{at} ({source.name}): give one of paths, hub and {source.made}")
        elif source.registered:
            problems += _without_effect(at, source)
        problems += [
            f"{at}.where.{name}: YAML takes yes, no, on, off for truth values; give texts in quotes: 'no'"
            for name, values in source.where.items()
            if {bool, str} <= {*map(type, values)}
        ]
        problems += [
            f"{at}.metadata_fields: {name!r} is a column that the workflow adds; leave it out"
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


def _without_effect(at: str, source: Corpus | ChatSource) -> list[str]:
    """The keys of a source that say how its data is made, where it was made elsewhere."""
    return [
        f"{at}.{name}: has no effect on {source.made} that were made elsewhere; leave it out"
        for name, field in type(source).model_fields.items()
        if name not in ("name", source.made)
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
    problems = [divides(f"model.{a}", getattr(model, a), f"model.{b}", getattr(model, b)) for a, b in checks]
    if model.moe_router_topk > model.num_moe_experts:
        problems.append(
            f"model.moe_router_topk {model.moe_router_topk} is more than "
            f"model.num_moe_experts {model.num_moe_experts}"
        )
    if model.routed_layers and model.num_moe_experts < 2:  # its routers look for the two best scores
        problems.append(
            "model.num_moe_experts 1: transformers cannot compute a model with one routed expert; give two, "
            "or take dense layers (-)"
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
        problems.append(divides("sft_data.pack_size", pack_size, "sft_data.padding_multiple", multiple))
    return problems
