"""What a step shows beside its losses: how evenly experts are used, and which process the others wait for.

Both are seen where a process has computed its gradients and has not yet begun to wait for those of the
others.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from snaketron.model import backend

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter

DEAD = 0.01  # an expert with less than this share of the mean load of its layer
COUNTED = 100  # tokens that an expert has in the mean, for one without tokens to say something


class Observed:
    """The steps of this process since the last line of metrics. All ranks call the same methods."""

    def __init__(self, config: TransformerConfig, model: torch.nn.Module) -> None:
        self.routers = [
            m for m in model.modules() if isinstance(m, TopKRouter) and m.local_tokens_per_expert is not None
        ]
        self.has_experts = bool(config.num_moe_experts)
        self.seconds, self.is_due = 0.0, False
        self.tokens: torch.Tensor | None = None  # (layers, experts) of the step that a line is written after
        self.marks: list[Any] = []
        self.finalize = config.finalize_model_grads_func
        config.finalize_model_grads_func = self._computed

    def begin(self, *, is_due: bool) -> None:
        """A step begins; `is_due` where a line of metrics follows it."""
        self.is_due, self.marks = is_due, [_mark()]

    def end(self) -> None:
        """The step is over, and the host has waited for it."""
        self.seconds += _seconds(*self.marks)

    def _computed(self, *args: Any, **named: Any) -> None:
        """In the place of megatron-core's function that adds up gradients over processes."""
        self.marks.append(_mark())
        if self.is_due and self.routers:
            self.tokens = torch.stack([router.local_tokens_per_expert for router in self.routers]).double()
        self.finalize(*args, **named)

    def experts(self) -> dict[str, Any]:
        """Load of the least and the most used expert, over the mean of its layer, and how many are dead.

        Over all layers; nothing for a model without experts.
        """
        if not self.has_experts:
            return {}
        # A pipeline stage without routed layers must take part in what follows.
        most, most_free, dead = 0.0, 0.0, 0.0
        if self.tokens is not None:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(self.tokens, group=group)
            means = self.tokens.mean(dim=1, keepdim=True)
            loads = self.tokens / means.clamp(min=1)
            most, most_free = float(loads.max()), 1 - float(loads.min())
            dead = float(((loads < DEAD) & (means >= COUNTED)).sum())
        stages = parallel_state.get_pipeline_model_parallel_group()
        extremes = torch.tensor([most, most_free], dtype=torch.float64, device=backend.device())
        sum_of_dead = torch.tensor(dead, dtype=torch.float64, device=backend.device())
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=stages)
        torch.distributed.all_reduce(sum_of_dead, group=stages)
        most, most_free = extremes.tolist()
        return {
            "experts": {"least": round(1 - most_free, 4), "most": round(most, 4), "dead": int(sum_of_dead)}
        }

    def slowest(self, data_seconds: float) -> dict[str, Any]:
        """The process that computed longest against its pipeline stage, and the longest wait for data of any.

        `data_seconds` is the wait of this process. Nothing where there is no other one.
        """
        world = torch.distributed.get_world_size()
        own, self.seconds = self.seconds, 0.0
        if world == 1:
            return {}
        here = torch.tensor([own, data_seconds], dtype=torch.float64, device=backend.device())
        gathered = torch.zeros(world * 2, dtype=torch.float64, device=backend.device())
        torch.distributed.all_gather_into_tensor(gathered, here)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return {"slowest": slowest(gathered.reshape(world, 2).tolist(), stages)}


def slowest(times: list[list[float]], stages: int) -> dict[str, Any]:
    """The rank that computed longest among those of the same layers, and the longest wait for data of any.

    `times` are the seconds of computing and of waiting for data by rank. Consecutive ranks are a pipeline
    stage.

    >>> slowest([[2.0, 0.1], [3.0, 0.0], [2.0, 0.2], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]], stages=2)
    {'rank': 1, 'ratio': 1.5, 'seconds_lost': 1.0, 'data_seconds': 0.2}
    """
    size = len(times) // stages
    computed = [own for own, _ in times]
    usual = [statistics.median(computed[i - i % size : i - i % size + size]) for i in range(len(times))]
    ratios = [own / max(typical, 1e-9) for own, typical in zip(computed, usual, strict=True)]
    rank = max(range(len(times)), key=ratios.__getitem__)
    return {
        "rank": rank,
        "ratio": round(ratios[rank], 3),
        "seconds_lost": round(computed[rank] - usual[rank], 3),
        "data_seconds": round(max(waited for _, waited in times), 3),
    }


def _mark() -> Any:
    """Now, in what this process computes: on a GPU the host is ahead of it."""
    if backend.device().type == "cpu":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return float(end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000)
