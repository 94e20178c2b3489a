"""The forward pass of a model that one process computes on a CPU in fp32, without megatron-core's wrappers.

The wrappers take three quarters of the time of a token of a tiny model. Weights and adapters are the modules'
own; attention and Mamba-2 come from the decoder, which remembers. All other models and layouts go through
megatron-core, and tests compare both with the whole forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from snaketron.model import backend
from snaketron.model.build import BuiltModel

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

type Piece = Callable[[Tensor], Tensor]  # (new, rows, inputs) to (new, rows, outputs)
type Remembering = Callable[..., Any]  # forward of a piece of the decoder, without its first argument


def wrapped(module: Any) -> Piece:
    """A linear layer as megatron-core computes it, without the bias that it gives too (none)."""
    return lambda x: module(x)[0]


def linear(module: Any) -> Piece:
    """A linear layer, with its norm if it has one; the module itself where it has an adapter."""
    if hasattr(module, "lora"):
        return wrapped(module)
    weight, norm = module.weight, getattr(module, "layer_norm_weight", None)
    if norm is None:
        return lambda x: F.linear(x, weight)
    shape, epsilon = norm.shape, module.config.layernorm_epsilon
    return lambda x: F.linear(F.rms_norm(x, shape, norm, epsilon), weight)


def applies(built: BuiltModel) -> bool:
    """Whether a model can be computed so."""
    return (
        torch.distributed.get_world_size() == 1
        and backend.device().type == "cpu"
        and built.config.params_dtype is torch.float32
    )


class Direct:
    """Called with ids (rows, new), it gives logits (rows, new, padded vocabulary)."""

    def __init__(self, built: BuiltModel, remembering: Mapping[Any, Remembering]) -> None:
        """`remembering` has what stands for the forward of core attention and of Mamba-2, by module."""
        model = built.model
        self._embedding = model.embedding.word_embeddings.weight
        self._layers = [_layer(layer, remembering) for layer in model.decoder.layers]
        norm = model.decoder.final_norm
        self._norm = norm.weight, built.config.layernorm_epsilon
        self._output = model.output_layer.weight

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        hidden = F.embedding(ids.T, self._embedding)
        for layer in self._layers:
            hidden = hidden + layer(hidden)
        weight, epsilon = self._norm
        return F.linear(F.rms_norm(hidden, weight.shape, weight, epsilon), self._output).transpose(0, 1)


def _layer(layer: Any, remembering: Mapping[Any, Remembering]) -> Piece:
    """What a layer adds to the residual."""
    if isinstance(layer, MambaLayer):
        mixer = remembering[layer.mixer]
        return lambda hidden: mixer(hidden)[0]
    if isinstance(layer.self_attention, SelfAttention):
        return _attention(layer.self_attention, remembering[layer.self_attention.core_attention])
    if isinstance(layer.mlp, MoELayer):
        return _Experts(layer.mlp, layer.pre_mlp_layernorm.weight)
    return _mlp(layer.mlp)


def _attention(module: SelfAttention, core: Remembering) -> Piece:
    project, out = linear(module.linear_qkv), linear(module.linear_proj)
    groups, width = module.num_query_groups_per_partition, module.hidden_size_per_attention_head
    queries = module.num_attention_heads_per_partition // groups * width

    def forward(hidden: Tensor) -> Tensor:
        mixed = project(hidden).unflatten(-1, (groups, -1))
        query, key, value = mixed.split([queries, width, width], -1)
        return out(core(query.reshape(*query.shape[:2], -1, width), key, value))

    return forward


def _mlp(module: Any) -> Piece:
    up, down = linear(module.linear_fc1), linear(module.linear_fc2)
    return lambda x: down(F.relu(up(x)).square())


class _Experts:
    """A layer of routed and shared experts; only experts that have tokens compute."""

    def __init__(self, module: MoELayer, norm: Tensor) -> None:
        config, self._router, self._norm = module.config, module.router, norm
        self._epsilon, self._topk = config.layernorm_epsilon, config.moe_router_topk
        self._scale = config.moe_router_topk_scaling_factor or 1.0
        self._shared = _mlp(module.shared_experts) if module.shared_experts is not None else None
        latent = bool(config.moe_latent_size)
        self._into = linear(module.fc1_latent_proj) if latent else None
        self._out_of = linear(module.fc2_latent_proj) if latent else None
        self._experts = [
            (linear(expert.linear_fc1), linear(expert.linear_fc2)) for expert in module.experts.local_experts
        ]

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, self._norm.shape, self._norm, self._epsilon)
        chosen, probabilities = self._route(normed)
        out = self._routed(normed if self._into is None else self._into(normed), chosen, probabilities)
        if self._out_of is not None:
            out = self._out_of(out)
        return out if self._shared is None else out + self._shared(normed)

    def _route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, both (tokens, topk): as megatron-core routes."""
        router = self._router
        plain = not hasattr(router, "lora")
        logits = F.linear(normed, router.weight) if plain else router.gating(normed)
        scores = logits.flatten(0, 1).sigmoid()
        chosen = (scores + router.expert_bias).topk(self._topk, sorted=False).indices
        probabilities = scores.gather(1, chosen)
        if self._topk > 1:
            probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + 1e-20)
        return chosen, probabilities * self._scale

    def _routed(self, x: Tensor, chosen: Tensor, probabilities: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        if len(tokens) == 1:
            for place, expert in enumerate(chosen[0].tolist()):
                out += self._expert(expert, tokens, probabilities[:, place : place + 1])
            return out.view(x.shape)
        for expert in chosen.unique().tolist():
            which, place = (chosen == expert).nonzero(as_tuple=True)
            out.index_add_(0, which, self._expert(expert, tokens[which], probabilities[which, place, None]))
        return out.view(x.shape)

    def _expert(self, number: int, tokens: Tensor, probabilities: Tensor) -> Tensor:
        up, down = self._experts[number]
        return down(F.relu(up(tokens)).square_() * probabilities)
