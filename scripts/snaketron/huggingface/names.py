"""The tensors of a published checkpoint, and which part of Megatron's checkpoint each of them is.

A published tensor is made of rows of Megatron's tensors, one below the other, and nothing is computed: so
both directions are exact. Source of the names: the index of NVIDIA-Nemotron-3-Super-120B-A12B-BF16, which
lists 42,683 tensors; multi-token prediction is flat there, with the parts of a depth in its first and last
layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from snaketron.config import Model
from snaketron.sizes.parameters import CONV_WIDTH, expert_width


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a tensor of Megatron's checkpoint, or of one expert in it."""

    key: str
    start: int
    stop: int
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A published tensor: its parts, one below the other, are all of it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    fp32: bool = False  # whatever the precision of the others is

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def tensors(model: Model, vocab_size: int) -> list[Tensor]:
    """All tensors of a published checkpoint in order; `vocab_size` counts tokens, without padding."""
    hidden = model.hidden_size
    found = [_whole("backbone.embeddings.weight", "embedding.word_embeddings.weight", vocab_size, hidden)]
    for i, letter in enumerate(model.hybrid_layer_pattern):
        found += _layer(model, letter, f"backbone.layers.{i}.", f"decoder.layers.{i}.")
    found.append(_whole("backbone.norm_f.weight", "decoder.final_norm.weight", hidden))
    found.append(_whole("lm_head.weight", "output_layer.weight", vocab_size, hidden))
    if model.mtp_num_layers:
        found += _multi_token_prediction(model)
    return found


def _multi_token_prediction(model: Model) -> Iterator[Tensor]:
    """The block, which all depths share: a published checkpoint has it once."""
    hidden, pattern, block = model.hidden_size, model.mtp_hybrid_layer_pattern, "mtp.layers.0."
    yield _whole("mtp.layers.0.eh_proj.weight", f"{block}eh_proj.weight", hidden, 2 * hidden)
    yield _whole("mtp.layers.0.enorm.weight", f"{block}enorm.weight", hidden)
    yield _whole("mtp.layers.0.hnorm.weight", f"{block}hnorm.weight", hidden)
    for i, letter in enumerate(pattern):
        yield from _layer(model, letter, f"mtp.layers.{i}.", f"{block}mtp_model_layer.layers.{i}.")
    last = f"mtp.layers.{len(pattern) - 1}.final_layernorm.weight"
    yield _whole(last, f"{block}final_layernorm.weight", hidden)


def _layer(model: Model, letter: str, to: str, of: str) -> Iterator[Tensor]:
    """The tensors of a layer by its letter, from the prefix `of` to the prefix `to`."""
    hidden, mixer = model.hidden_size, f"{to}mixer."
    if letter == "M":
        yield _whole(f"{to}norm.weight", f"{of}mixer.in_proj.layer_norm_weight", hidden)
        yield from _mamba(model, mixer, f"{of}mixer.")
    elif letter == "*":
        yield _whole(f"{to}norm.weight", f"{of}self_attention.linear_qkv.layer_norm_weight", hidden)
        yield from _attention(model, mixer, f"{of}self_attention.")
    elif letter == "-":
        yield _whole(f"{to}norm.weight", f"{of}mlp.linear_fc1.layer_norm_weight", hidden)
        yield from _mlp(mixer, f"{of}mlp.", hidden, model.ffn_hidden_size)
    else:
        yield _whole(f"{to}norm.weight", f"{of}pre_mlp_layernorm.weight", hidden)
        yield from _experts(model, mixer, f"{of}mlp.")


def _mamba(model: Model, to: str, of: str) -> Iterator[Tensor]:
    hidden, heads = model.hidden_size, model.mamba_num_heads
    inner, states = heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    convolved = {"x": inner, "B": states, "C": states}
    rows = {"z": inner, **convolved, "dt": heads}
    yield _below(f"{to}in_proj.weight", f"{of}in_proj.weight", rows, hidden)
    yield _below(f"{to}conv1d.weight", f"{of}conv1d.weight", convolved, 1, CONV_WIDTH)
    yield _below(f"{to}conv1d.bias", f"{of}conv1d.bias", convolved)
    for name, size in (("A_log", heads), ("D", heads), ("dt_bias", heads), ("norm.weight", inner)):
        yield _whole(f"{to}{name}", f"{of}{name}", size)
    yield _whole(f"{to}out_proj.weight", f"{of}out_proj.weight", hidden, inner)


def _attention(model: Model, to: str, of: str) -> Iterator[Tensor]:
    """Megatron has the queries, key and value of one group after the other."""
    hidden, width, groups = model.hidden_size, model.kv_channels, model.num_query_groups
    queries = model.num_attention_heads // groups
    key, group = f"{of}linear_qkv.weight", (queries + 2) * width
    for name, start, heads in (("q", 0, queries), ("k", queries, 1), ("v", queries + 1, 1)):
        first = [g * group + start * width for g in range(groups)]
        parts = tuple(Part(key, row, row + heads * width) for row in first)
        yield Tensor(f"{to}{name}_proj.weight", (groups * heads * width, hidden), parts)
    yield _whole(f"{to}o_proj.weight", f"{of}linear_proj.weight", hidden, groups * queries * width)


def _mlp(to: str, of: str, width: int, inner: int) -> Iterator[Tensor]:
    yield _whole(f"{to}up_proj.weight", f"{of}linear_fc1.weight", inner, width)
    yield _whole(f"{to}down_proj.weight", f"{of}linear_fc2.weight", width, inner)


def _experts(model: Model, to: str, of: str) -> Iterator[Tensor]:
    hidden, experts, width = model.hidden_size, model.num_moe_experts, expert_width(model)
    yield _whole(f"{to}gate.weight", f"{of}router.weight", experts, hidden)
    bias = f"{of}router.expert_bias"
    yield Tensor(f"{to}gate.e_score_correction_bias", (experts,), (Part(bias, 0, experts),), fp32=True)
    if model.moe_latent_size:
        yield _whole(f"{to}fc1_latent_proj.weight", f"{of}fc1_latent_proj.weight", width, hidden)
        yield _whole(f"{to}fc2_latent_proj.weight", f"{of}fc2_latent_proj.weight", hidden, width)
    shared = model.moe_shared_expert_intermediate_size
    yield from _mlp(f"{to}shared_experts.", f"{of}shared_experts.", hidden, shared)
    inner = model.moe_ffn_hidden_size
    for name, linear, rows, columns in (
        ("up_proj", "linear_fc1", inner, width),
        ("down_proj", "linear_fc2", width, inner),
    ):
        key = f"{of}experts.experts.{linear}.weight"
        for e in range(experts):
            yield Tensor(f"{to}experts.{e}.{name}.weight", (rows, columns), (Part(key, 0, rows, e),))


def _whole(name: str, key: str, *shape: int) -> Tensor:
    return Tensor(name, shape, (Part(key, 0, shape[0]),))


def _below(name: str, key: str, rows: dict[str, int], *columns: int) -> Tensor:
    parts = tuple(Part(f"{key}.{part}", 0, size) for part, size in rows.items())
    return Tensor(name, (sum(rows.values()), *columns), parts)


# ------------------------------------------------------------------------------------ the other direction


@dataclass(frozen=True, slots=True)
class Source:
    """Rows [start, stop) of a published tensor, which are rows from `row` on of Megatron's."""

    name: str
    start: int
    stop: int
    row: int


@dataclass(frozen=True, slots=True)
class Megatron:
    """A tensor of Megatron's checkpoint, or one expert's part of it: where its rows are published."""

    key: str
    shape: tuple[int, ...]  # whole; with experts, they are the first axis
    sources: tuple[Source, ...]
    expert: int | None = None
    fp32: bool = False


def megatron_tensors(published: Iterable[Tensor], padding: dict[str, int]) -> list[Megatron]:
    """What a checkpoint of Megatron holds, in the order of the published tensors.

    `padding` has the rows of the tensors with a padded vocabulary, by key. The rows that no published tensor
    has are zero.
    """
    sources: dict[tuple[str, int | None], list[Source]] = {}
    columns: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    fp32: set[str] = set()
    for tensor in published:
        first = 0
        for part in tensor.parts:
            stop = first + part.stop - part.start
            source = Source(tensor.name, first, stop, part.start)
            sources.setdefault((part.key, part.expert), []).append(source)
            columns[part.key] = tensor.shape[1:]
            if part.expert is not None:
                experts[part.key] = part.expert + 1
            if tensor.fp32:
                fp32.add(part.key)
            first = stop
    found = []
    for (key, expert), parts in sources.items():
        rows = padding.get(key, max(part.row + part.stop - part.start for part in parts))
        shape = (rows, *columns[key]) if expert is None else (experts[key], rows, *columns[key])
        found.append(Megatron(key, shape, tuple(parts), expert, key in fp32))
    return found


VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # keys with a row for each token
