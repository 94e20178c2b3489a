"""What training reads and sets inside megatron-core by names that are not its interface.

Nothing is replaced here (`replacements` lists that); a new release may rename these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper


def take_router_loss(config: TransformerConfig, routed_layers: int) -> float:
    """The load balancing loss of the step, summed over micro-batches: the mean over the routed layers.

    The loss of a layer of multi-token prediction is the mean over its depths. megatron-core would count one
    such layer a depth, whatever the pattern. The tracker is emptied; every rank must call this.
    """
    if not routed_layers:
        return 0.0
    name = "seq_load_balancing_loss"
    losses: dict[str, torch.Tensor] = {}
    # A pipeline stage without routed layers must take part in the sums, with as many numbers and over the
    # same ranks.
    tracker, num_layers = get_moe_metrics_tracker(), config.num_layers + (config.mtp_num_layers or 0)
    tracker.ensure_initialized(name, num_layers)
    tracker.metrics[name].reduce_group = parallel_state.get_tensor_and_context_parallel_group()
    tracker.report(
        loss_scale=1.0,
        iteration=0,
        track_names=name,
        num_layers=num_layers,
        moe_layer_freq=[routed_layers],
        total_loss_dict=losses,
    )
    return float(losses[name])


def take_mtp_losses(depths: int) -> torch.Tensor:
    """The summed losses of multi-token prediction of this rank's step, (depths,); the tracker is emptied."""
    losses = MTPLossLoggingHelper.tracker.get("loss_values", torch.zeros(depths)).clone()
    MTPLossLoggingHelper.clean_metrics_in_tracker()
    return losses


def without_recordings() -> AbstractContextManager[None]:
    """Compute recorded layers anew, for a validation: the recordings are of a training step."""
    return _changed([(_CudagraphGlobalRecord, "cudagraph_created")], False)


def without_mtp(model: HybridModel) -> AbstractContextManager[None]:
    """Leave multi-token prediction out, which costs twice the rest of a tiny model and changes no answer."""
    return _changed([(model, "mtp_process")], False)


def without_sequence_parallel(model: HybridModel) -> AbstractContextManager[None]:
    """Let every rank have all tokens: the ranks of tensor parallelism cannot share a single one."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    places = [
        (owner, name)
        for owner in (model.config, *model.modules())
        for name in names
        if getattr(owner, name, False) is True
    ]
    return _changed(places, False)


def without_low_precision(model: HybridModel) -> AbstractContextManager[None]:
    """Multiply in the type of the weights: in fp8 and nvfp4 rows must come by eights or sixteens."""
    modules = list(model.modules())
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None))}
    places: list[tuple[Any, str]] = [(c, name) for c in configs.values() for name in ("fp8", "fp4")]
    places += [(module, "te_quant_params") for module in modules]
    return _changed([(owner, name) for owner, name in places if getattr(owner, name, None) is not None], None)


@contextlib.contextmanager
def _changed(places: list[tuple[Any, str]], value: object) -> Iterator[None]:
    """Give attributes another value for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, was in before:
            setattr(owner, name, was)
