"""LoRA: a frozen model with a low-rank adapter at each of the linear layers that are asked for.

    y = W x + alpha / rank * B A dropout(x)

Source: Hu et al., "LoRA: low-rank adaptation of large language models" (arXiv 2106.09685), section 4. A is
uniform within 1 / sqrt(inputs), as in the authors' code, and B zero, so the first step starts from the base.

An adapter is a child module `lora` of its linear layer and works in a forward hook, so that no other name of
the model changes, with megatron-core's layers as with Transformer Engine's. One factor is divided as W is,
the other one is whole on every rank:

- column parallel (A whole, B divided): x holds this rank's tokens. A x is gathered over the sequence.
- row parallel (A divided, B whole): x holds all tokens and this rank's inputs. A x is summed, and scattered
  over the sequence.
- replicated (both whole): x holds this rank's tokens.
- routed experts: the dispatcher brings all tokens to each rank of expert tensor parallelism and sums the
  outputs, for experts and adapters alike. Only the gradient of the whole factor needs a sum.

The gradient of a whole factor outside the experts is that of this rank's tokens; megatron-core sums it over
tensor parallelism for parameters marked `sequence_parallel`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from snaketron.config import Adapters
from snaketron.config.linears import matches
from snaketron.log import UserError
from snaketron.model.initial import draw_parts

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

COLUMN = ("linear_qkv", "in_proj", "linear_fc1", "eh_proj")
ROW = ("linear_proj", "out_proj", "linear_fc2")
REPLICATED = ("fc1_latent_proj", "fc2_latent_proj", "router")


class Adapter(torch.nn.Module):
    """The adapter of a linear layer. Routed experts that are one module have one adapter together.

    `a` is (rank, inputs) and `b` (outputs, rank); the experts of one module are a first axis of both.
    """

    def __init__(
        self, linear: Any, kind: str, settings: Adapters, config: TransformerConfig, *, expert: bool
    ) -> None:
        super().__init__()
        self.row, self.expert, self.replicated = kind in ROW, expert, kind in REPLICATED
        rank = (settings.expert_rank if expert else None) or settings.rank
        self.scale, self.dropout = settings.alpha / settings.rank, settings.dropout
        self.epsilon, self.sequence_parallel = config.layernorm_epsilon, config.sequence_parallel
        weights = weights_of(linear)
        self.experts = len(weights) if is_grouped(linear) else 0
        outputs, inputs = weights[0].shape
        first = (self.experts,) if self.experts else ()
        self.a = torch.nn.Parameter(weights[0].new_ones(*first, rank, inputs))
        self.b = torch.nn.Parameter(weights[0].new_zeros(*first, outputs, rank))
        self.group = (
            parallel_state.get_expert_tensor_parallel_group()
            if expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        whole: Any
        divided: Any
        whole, divided, axis = (self.b, self.a, -1) if self.row else (self.a, self.b, -2)
        for parameter in (whole, divided) if self.replicated else (whole,):
            parameter.sequence_parallel = self.sequence_parallel and not expert
        if not self.replicated:
            divided.tensor_model_parallel = True
            divided.partition_dim, divided.partition_stride = divided.dim() + axis, 1
        for parameter in (whole, divided):
            parameter.allreduce = not expert  # how megatron-core marks what is not an expert

    def added_to(self, linear: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the linear layer: the output of the adapter is added to its own; a bias stays."""
        x, *counts = arguments
        norm = getattr(linear, "layer_norm_weight", None)
        if norm is not None:  # RMSNorm and linear layer in one module
            x = F.rms_norm(x, x.shape[-1:], norm, self.epsilon)
        ends = None
        if self.experts:
            ends = torch.tensor(counts[0], device=x.device).cumsum(0).int()
        return (output[0] + self(x, ends), *output[1:])

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """What the adapter adds.

        Args:
            x: (..., inputs): what the linear layer multiplies, (length, batch, inputs) or (tokens, inputs).
            ends: (experts,), where the tokens of each expert end, for adapters of several experts.

        Returns:
            (..., outputs), shaped as the linear layer's output.
        """
        x = self._dropped(x)
        a: Tensor = self.a
        b: Tensor = self.b
        if self.expert and self.group.size() > 1:  # the gradient of the whole factor is summed
            a, b = (a, self._everywhere(b)) if self.row else (self._everywhere(a), b)
        hidden = _product(x, a, ends)
        if self.group.size() > 1 and not self.expert and not self.replicated:
            if self.row and self.sequence_parallel:
                hidden = tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
            elif self.row:  # every rank has all tokens while the model answers
                hidden = tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self.group)
            elif self.sequence_parallel:
                hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.group)
        return _product(hidden * self.scale, b, ends)

    def _everywhere(self, factor: Tensor) -> Tensor:
        return tensor_parallel.copy_to_tensor_model_parallel_region(factor, group=self.group)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return x
        # Each rank drops other tokens or inputs; only the experts' first layer has one input on all ranks.
        same = self.expert and not self.row
        with tensor_parallel.get_cuda_rng_tracker().fork(
            "data-parallel-rng" if same else "model-parallel-rng"
        ):
            return F.dropout(x, self.dropout)

    @torch.no_grad()
    def merge_into(self, linear: Any) -> None:
        """Add the adapter to the weight, computed in float32, and empty it."""
        pairs = zip(self.a, self.b, strict=True) if self.experts else [(self.a, self.b)]
        for weight, (a, b) in zip(weights_of(linear), pairs, strict=True):
            weight.copy_(weight.float() + self.scale * (b.float() @ a.float()))
        self.b.zero_()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The shards of both factors. An expert's shard has the same key with and without grouping."""
        axes = {} if self.replicated else {"a": 1} if self.row else {"b": 0}
        if not self.experts:
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(keep_vars=True),
                prefix,
                axes,
                sharded_offsets,
                tp_group=self.group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        shared, rank, size = parallel_state, self.group.rank(), self.group.size()
        experts = (0, shared.get_expert_model_parallel_rank(), shared.get_expert_model_parallel_world_size())
        found = {}
        for name, factor in (("a", self.a), ("b", self.b)):
            divided = [(axes[name] + 1, rank, size)] if name in axes else []
            found[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                factor,
                experts,
                *divided,
                replica_id=(0, 0 if divided else rank, shared.get_expert_data_parallel_rank()),
            )
        return found


def _product(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    """x (..., inputs) times weight (outputs, inputs), or times the weight of each token's expert."""
    if ends is None:
        return F.linear(x, weight)
    if x.dtype != torch.bfloat16 or not len(x):
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weight, strict=True)])
    # The kernel takes rows of a multiple of 16 bytes. A loop would ask the host for the numbers of tokens,
    # which the recording of a decoder's step cannot.
    outputs, inputs = weight.shape[1:]
    more = -inputs % 8, -outputs % 8
    if any(more):
        x, weight = F.pad(x, (0, more[0])), F.pad(weight, (0, more[0], 0, more[1]))
    return torch._grouped_mm(x, weight.mT, offs=ends)[:, :outputs]


def is_grouped(module: torch.nn.Module) -> bool:
    """Whether a module has the weights of several experts: Transformer Engine's GroupedLinear."""
    return hasattr(module, "weight0")


def weights_of(linear: Any) -> list[Tensor]:
    """The weight of a linear layer, or those of all experts of a grouped one."""
    if is_grouped(linear):
        return [getattr(linear, f"weight{i}") for i in range(linear.num_gemms)]
    return [linear.weight]


def canonical(name: str) -> str:
    """The name of a module without the numbers of layers and experts: as `config.linears` writes it.

    >>> canonical("decoder.layers.3.mlp.experts.local_experts.5.linear_fc1")
    'decoder.layers.mlp.experts.linear_fc1'
    """
    return re.sub(r"\.\d+(?=\.)", "", name).replace(".local_experts.", ".")


@torch.no_grad()
def freeze(model: HybridModel) -> None:
    """Let nothing train the weights of a model of `build_model`.

    Those of a layer's experts are put one after the other in memory, as the grouped product wants them.
    Trained ones lie so in the buffer of DistributedDataParallel.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if is_grouped(module):
            weights = weights_of(module)
            for weight, place in zip(weights, torch.stack(weights), strict=True):
                weight.data = place


def add_adapters(model: HybridModel, settings: Adapters, seed: int) -> None:
    """Freeze a model of `build_model`, and give its targeted linear layers adapters; before it is wrapped.

    Nothing of the base changes in training any more: the routers' bias, which evens the experts' load, is
    frozen as well, so that base + adapters is the whole result. Frozen parameters get no gradient buffers and
    no optimizer state from megatron-core. Adapters are of the weights' type; under bf16 the optimizer keeps
    fp32 main weights of them.

    Args:
        settings: rank, scale, dropout and targets, which `config.linears.check_targets` has checked.
        seed: of A, which depends on it and on the name, and not on how processes share the model.
    """
    freeze(model)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.frozen_expert_bias = True
    found = 0
    for name, module in list(model.named_modules()):
        kind = name.rpartition(".")[2]
        if kind not in COLUMN + ROW + REPLICATED:
            continue
        if any(matches(target, canonical(name)) for target in settings.target_modules):
            _adapt(module, Adapter(module, kind, settings, model.config, expert=".experts." in name))
            found += 1
    if not found:
        what = "this model"
        if (stages := model.config.pipeline_model_parallel_size) > 1:
            what = f"pipeline stage {parallel_state.get_pipeline_model_parallel_rank()} of {stages}"
        raise UserError(
            f"lora.target_modules: no layer of {what} is one of {settings.target_modules}; "
            "docs/tuning.md lists their names"
        )
    if hasattr(model, "embedding"):
        # What is recomputed, or comes from another pipeline stage, has gradients only if its input wants one.
        model.embedding.register_forward_hook(_want_gradient)
    shards = Part(model, adapters=True).sharded_state_dict(_groups())
    draw_parts([shard for key, shard in shards.items() if key.endswith(".lora.a")], _draw_a, seed)


def _want_gradient(_module: Any, _arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _draw_a(_key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = shape[-1] ** -0.5
    values = torch.empty(shape, dtype=torch.float32, device=generator.device)
    return values.uniform_(-bound, bound, generator=generator)


def _adapt(linear: Any, adapter: Adapter) -> None:
    linear.lora = adapter
    if isinstance(linear, TopKRouter):  # its product is one of its methods
        linear.gating = functools.partial(_gating, linear.gating, adapter)
    else:
        linear.register_forward_hook(adapter.added_to)
    linear.sharded_state_dict = functools.partial(_sharded_state_dict, linear, linear.sharded_state_dict)


def _gating(plain: Callable[[Tensor], Tensor], adapter: Adapter, x: Tensor) -> Tensor:
    logits = plain(x)
    return logits + adapter(x).to(logits.dtype)


def _sharded_state_dict(
    linear: Any,
    plain: Callable[..., dict[str, Any]],
    prefix: str = "",
    sharded_offsets: tuple = (),
    metadata: dict | None = None,
) -> dict[str, Any]:
    """The shards of a linear layer, and of its adapter, which the layer itself would take for replicated."""
    shards = plain(prefix, sharded_offsets, metadata)
    own = linear.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)
    sizes = getattr(weights_of(linear)[0], "partition_sizes", None)
    if sizes:  # Mamba's in_proj has z, x, B, C and dt side by side, each divided
        b = f"{prefix}lora.b"
        own[b] = _split_tensor_factory(own[b], sizes, ["z", "x", "B", "C", "dt"], 0)
    return {k: v for k, v in shards.items() if not k.startswith(f"{prefix}lora.")} | own


def adapted(model: torch.nn.Module) -> Iterator[tuple[Any, Adapter]]:
    """Each linear layer that has an adapter, and the adapter."""
    for module in model.modules():
        if isinstance(adapter := getattr(module, "lora", None), Adapter):
            yield module, adapter


def merge(model: torch.nn.Module) -> None:
    """Add every adapter to its weight in place, and empty it. Each rank adds its own parts."""
    for linear, adapter in adapted(model):
        adapter.merge_into(linear)


def seed_dropout(seed: int, iteration: int) -> None:
    """Let the dropout of a step depend on its number alone, so that a resumed training draws the same."""
    tensor_parallel.model_parallel_cuda_manual_seed(
        (seed + 1_000_003 * (iteration + 1)) % 2**31, force_reset_rng=True
    )


class Part:
    """The adapters of a model, or all but them, as checkpoints see it."""

    def __init__(self, model: HybridModel, *, adapters: bool) -> None:
        self.model, self.adapters = model, adapters

    def _is_here(self, key: str) -> bool:
        return (".lora." in key) == self.adapters

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Like that of megatron-core's modules, without the keys of the other part."""
        return {k: v for k, v in self.model.sharded_state_dict(metadata=metadata).items() if self._is_here(k)}

    def load_state_dict(self, state: dict[str, Any], *, strict: Literal[False]) -> Any:
        """Like `torch.nn.Module.load_state_dict`, but keys of other parts of the model are not missing."""
        found = self.model.load_state_dict(state, strict=strict)
        missing = [key for key in found.missing_keys if self._is_here(key)]
        return type(found)(missing, found.unexpected_keys)


def _groups() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
