"""Layers for a machine without a GPU, in place of Transformer Engine's and mamba-ssm's.

They keep the parameter names of those, so that a checkpoint moves between the two.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from snaketron.model.megatron import mamba2, packed

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


def _mark_sequence_parallel(parameter: Tensor, config: TransformerConfig) -> None:
    # Gradients of such parameters are summed over the ranks that hold parts of the sequence.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(torch.nn.RMSNorm):
    """TENorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self.weight, config)


class NormColumnParallelLinear(ColumnParallelLinear):
    """TELayerNormColumnParallelLinear: RMSNorm and linear in one module."""

    def __init__(self, input_size: int, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        _mark_sequence_parallel(self.layer_norm_weight, config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (length, batch, inputs) to (length, batch, outputs / TP), and the bias if it is apart."""
        return super().forward(
            F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
        )


class DuplicatedLinear(torch.nn.Linear):
    """TELinear(parallel_mode="duplicated"): the projections into and out of the experts' latent space."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        **_: Any,
    ) -> None:
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        with tensor_parallel.get_cuda_rng_tracker().fork("data-parallel-rng"):
            init_method(self.weight)
        _mark_sequence_parallel(self.weight, config)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """x (..., input size) to (..., output size), and no bias."""
        return super().forward(x), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class Attention(torch.nn.Module):
    """TEDotProductAttention on torch's scaled_dot_product_attention.

    Causal, grouped queries, packed sequences ("thd") or context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.cp_group, self.scale = pg_collection.cp, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query (length, batch, heads, width), key and value with fewer heads; packed: without batch."""
        q, k, v = (x.unsqueeze(1) if query.dim() == 3 else x for x in (query, key, value))
        ranks, length = self.cp_group.size(), len(q)
        # Bounds of the sequences, the positions that this rank has the queries of, and those of all keys.
        ends = (
            torch.tensor([0, length * ranks]) if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        )
        positions = torch.arange(length)
        if ranks > 1:
            parts = [packed.partition(ends, length * ranks, ranks, rank) for rank in range(ranks)]
            positions = parts[self.cp_group.rank()]
            k, v = (
                tensor_parallel.gather_from_sequence_parallel_region(x, group=self.cp_group)[
                    torch.cat(parts).argsort()
                ]
                for x in (k, v)
            )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        # One sequence after the other: a mask of a whole pack grows with the square of its length.
        ends = ends.unique_consecutive()  # without sequences that are empty
        bounds = torch.searchsorted(positions, ends.long()).tolist()
        out = [
            F.scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, :, start:end],
                v[:, :, start:end],
                None if ranks == 1 else positions[first:last, None] >= torch.arange(start, end),
                is_causal=ranks == 1,
                scale=self.scale,
                enable_gqa=True,
            )
            for (first, last), (start, end) in zip(
                itertools.pairwise(bounds), itertools.pairwise(ends.tolist()), strict=True
            )
        ]
        return torch.cat(out, 2).permute(2, 0, 1, 3).flatten(2)


class GatedRMSNorm(mamba2.RMSNormGated):
    """megatron-core's ExtendedRMSNorm, whose base class is mamba-ssm's."""

    tp_group: torch.distributed.ProcessGroup

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


hybrid_stack_spec = ModuleSpec(
    HybridStack,
    submodules=HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            MambaLayer,
            submodules=MambaLayerSubmodules(
                mixer=ModuleSpec(
                    MambaMixer,
                    submodules=MambaMixerSubmodules(
                        in_proj=NormColumnParallelLinear, out_proj=RowParallelLinear
                    ),
                ),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                self_attention=ModuleSpec(
                    SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=NormColumnParallelLinear,
                        core_attention=Attention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            MLPLayer,
            submodules=TransformerLayerSubmodules(
                mlp=functools.partial(
                    MLP.as_mlp_submodule,
                    submodules=MLPSubmodules(
                        linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear
                    ),
                ),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=RMSNorm,
                mlp=get_moe_module_spec(use_te=False, num_experts=1),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        mtp_block_spec=ModuleSpec(
            MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[
                    ModuleSpec(
                        MultiTokenPredictionLayer,
                        submodules=MultiTokenPredictionLayerSubmodules(
                            enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm, eh_proj=ColumnParallelLinear
                        ),
                    )
                ]
            ),
        ),
    ),
)
