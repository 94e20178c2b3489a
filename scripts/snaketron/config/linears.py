"""The linear layers that LoRA can adapt: their names, shapes, and what divides them among processes."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from snaketron.config.base import suggest
from snaketron.config.training import Model


class Linear(NamedTuple):
    """A linear layer: its weight is (outputs, inputs)."""

    name: str  # of its module, without the numbers of layers and experts
    inputs: int
    outputs: int
    # Tensor parallelism divides outputs (column), inputs (row) or nothing.
    parallel: Literal["column", "row", "replicated"]
    experts: int = 0  # routed experts, each of which has such a layer; 0 in all other layers


def linears_of_layer(model: Model, letter: str) -> list[Linear]:
    """The linear layers of a layer, by its letter in the pattern."""
    hidden = model.hidden_size
    if letter == "M":
        inner = model.mamba_num_heads * model.mamba_head_dim
        states = 2 * model.mamba_num_groups * model.mamba_state_dim
        return [
            Linear("mixer.in_proj", hidden, 2 * inner + states + model.mamba_num_heads, "column"),
            Linear("mixer.out_proj", inner, hidden, "row"),
        ]
    if letter == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        return [
            Linear("self_attention.linear_qkv", hidden, queries + keys_values, "column"),
            Linear("self_attention.linear_proj", queries, hidden, "row"),
        ]
    if letter == "-":
        return _mlp("mlp", hidden, model.ffn_hidden_size)
    latent, experts = model.moe_latent_size, model.num_moe_experts
    projections = [
        Linear("mlp.fc1_latent_proj", hidden, latent or 0, "replicated"),
        Linear("mlp.fc2_latent_proj", latent or 0, hidden, "replicated"),
    ]
    return [
        Linear("mlp.router", hidden, experts, "replicated"),
        *(projections if latent else ()),
        *_mlp("mlp.experts", latent or hidden, model.moe_ffn_hidden_size, experts),
        *_mlp("mlp.shared_experts", hidden, model.moe_shared_expert_intermediate_size),
    ]


def _mlp(name: str, width: int, inner: int, experts: int = 0) -> list[Linear]:
    return [
        Linear(f"{name}.linear_fc1", width, inner, "column", experts),
        Linear(f"{name}.linear_fc2", inner, width, "row", experts),
    ]


def linears(model: Model, pattern: str, *, with_mtp: bool) -> list[Linear]:
    """The linear layers of a pattern in order, then those of the multi-token prediction block."""
    found = [
        linear._replace(name=f"decoder.layers.{linear.name}")
        for letter in pattern
        for linear in linears_of_layer(model, letter)
    ]
    if with_mtp and model.mtp_num_layers:
        hidden = model.hidden_size
        found.append(Linear("mtp.layers.eh_proj", 2 * hidden, hidden, "column"))
        found += [
            linear._replace(name=f"mtp.layers.mtp_model_layer.layers.{linear.name}")
            for letter in model.mtp_hybrid_layer_pattern
            for linear in linears_of_layer(model, letter)
        ]
    return found


def matches(target: str, name: str) -> bool:
    """Whether a target means the layer `name`: it must be the end of the name; `*` stands for anything.

    >>> matches("linear_fc1", "decoder.layers.mlp.experts.linear_fc1")
    True
    >>> matches("shared_experts.linear_fc1", "decoder.layers.mlp.experts.linear_fc1")
    False
    """
    return fnmatchcase(f".{name}", f"*.{target}")


def targeted(targets: Iterable[str], found: Iterable[Linear]) -> list[Linear]:
    """The layers that some target means."""
    wanted = list(targets)
    return [linear for linear in found if any(matches(target, linear.name) for target in wanted)]


# A model with every kind of linear layer.
_ANY = Model(hybrid_layer_pattern="ME*-", mtp_hybrid_layer_pattern="ME*-", mtp_num_layers=1)


def check_names(at: str, targets: list[str]) -> list[str]:
    """Targets that mean no linear layer of any model."""
    return _unknown(at, targets, linears(_ANY, _ANY.hybrid_layer_pattern, with_mtp=True), "no linear layer")


def check_targets(at: str, targets: list[str], model: Model, stages: list[str]) -> list[str]:
    """Targets that mean no layer of this model, and pipeline stages (their patterns) without a target."""
    there = linears(model, model.hybrid_layer_pattern, with_mtp=True)
    if unknown := _unknown(at, targets, there, "no linear layer of this model"):
        return unknown
    held = [linears(model, stage, with_mtp=i == len(stages) - 1) for i, stage in enumerate(stages)]
    return [
        f"{at}: none of the layers {stages[i]} of pipeline stage {i} is meant; "
        f"add a target that it has, such as {_last(here[0].name)}"
        for i, here in enumerate(held)
        if not targeted(targets, here)
    ]


def _unknown(at: str, targets: list[str], there: list[Linear], what: str) -> list[str]:
    known = {_last(linear.name) for linear in there}
    return [
        f"{at}[{i}]: {target!r} is {what}{suggest(target, known)}"
        for i, target in enumerate(targets)
        if not targeted([target], there)
    ]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
