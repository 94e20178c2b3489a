"""megatron-core 0.19.2 on a CPU: stand-ins for the pieces that need a GPU.

Imported by `backend`, and only on a machine without a GPU. Modules keep the parameter names of
Transformer Engine's, so a checkpoint moves between the two. Each change to torch or megatron-core says
why it is there; it can go when megatron-core does that itself.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

from snaketron.model.megatron import mamba2, packed

import torch
import torch.nn.functional as F
from megatron.core import optimizer, parallel_state, rerun_state_machine, tensor_parallel, utils
from megatron.core.dist_checkpointing import exchange_utils
from megatron.core.dist_checkpointing.strategies import state_dict_saver
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.optimizer import clip_grads, distrib_optimizer, grad_scaler
from megatron.core.optimizer import optimizer as mixed_precision_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer, token_dispatcher
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


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's FusedAdam: AdamW with one step counter for each parameter group.

    megatron-core's distributed optimizer cannot resume torch.optim.AdamW: that has no state before its
    first step, and after loading all parameters would share one `step` tensor.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported on a CPU")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101), algorithm 2."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:  # a pipeline stage without routed experts, or a small group that others share
                continue
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            # The kernel of torch.optim.AdamW(fused=True), without its step counter for each parameter.
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"]))] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
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


# ------------------------------------------------------------------------------------ "cuda" means CPU


class _Stream(torch.cpu.Stream):
    def record_event(self, event: Any = None) -> Any:
        return torch.cpu.Event()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The tensor factory, reading device="cuda" as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _TorchOnCpu(types.ModuleType):
    """`torch` as seen by a megatron-core module that writes the literal device "cuda"."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_tensor_type = Tensor.type


def _type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = _tensor_type(self, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def _patch_torch() -> None:
    # megatron-core allocates on torch.cuda.current_device(); torch.cpu is torch's twin of torch.cuda.
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]  # stays a class: others annotate with it
    for name in ("current_device", "set_device", "synchronize", "stream", "current_stream"):
        # A function of its own: torch._dynamo refuses one function under two names.
        setattr(torch.cuda, name, functools.partial(getattr(torch.cpu, name)))
    # One generator plays both parts.
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    # The optimizers recognise types by names such as "torch.cuda.FloatTensor", and move state by .cuda().
    Tensor.type = _type  # type: ignore[method-assign,assignment]
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def _patch_megatron() -> None:
    for module in (
        clip_grads,
        exchange_utils,
        grad_scaler,
        hybrid_block,
        mixed_precision_optimizer,
        moe_layer,
        rerun_state_machine,
        schedules,
        state_dict_saver,
        utils,
    ):
        module.torch = _TorchOnCpu()
    # The setter waits until CUDA is initialised, which here never happens.
    tensor_parallel.random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(
        new_state
    )
    # gloo wants split sizes as lists; the original converts only what is on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    # See FusedAdam.
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    # Transformer Engine is hard-wired in these two.
    hybrid_block.TENorm = RMSNorm
    moe_layer.HAVE_TE, moe_layer.TELinear = True, DuplicatedLinear
    # And mamba-ssm in this one.
    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba2.mamba_split_conv1d_scan_combined
    mamba_mixer._check_mamba_sequence_packing_support = lambda **_: (True, None)
    # And Transformer Engine where packed sequences are shared by ranks.
    mamba_context_parallel.tex = types.SimpleNamespace(thd_get_partitioned_indices=packed.partition)
    mamba_context_parallel.is_te_min_version = lambda *_: True


# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _keep_freed_memory() -> None:
    """Have glibc reuse what a step frees; asking the kernel for it again, page by page, costs a step 5 %."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_patch_torch()
_patch_megatron()
_keep_freed_memory()
