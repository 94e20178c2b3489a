"""The losses of micro-batches: how they are computed, summed up over ranks and steps, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from snaketron.model import backend

import torch
from megatron.core import parallel_state
from torch import Tensor

Batch = dict[str, Any]  # keyword arguments of the model, and `report`


class Counts(NamedTuple):
    """What a micro-batch counts, beside its losses."""

    trained_tokens: float
    conversations: float
    tokens: float
    packs: float


@dataclass
class Sums:
    """Sums by source and name: `values` is (sources, names), float64, and `sums["loss"]` (sources,) a view.

    `loss` is the sum over trained tokens, and `sample_loss` that over conversations of each one's mean.
    """

    NAMES = ("loss", "trained_tokens", "sample_loss", "conversations", "tokens", "packs")

    values: Tensor

    @classmethod
    def zeros(cls, num_sources: int, device: torch.device | str = "cpu") -> Sums:
        return cls(torch.zeros(max(1, num_sources), len(cls.NAMES), dtype=torch.float64, device=device))

    def __getitem__(self, name: str) -> Tensor:
        return self.values[:, self.NAMES.index(name)]

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.values + other.values)

    def means(self) -> dict[str, Any]:
        """Over all sources: losses as means, counts as they are."""
        return self._means(self.values.sum(0))

    def means_of(self, source: int) -> dict[str, Any]:
        """Like `means`, of one source."""
        return self._means(self.values[source])

    @classmethod
    def _means(cls, row: Tensor) -> dict[str, Any]:
        values = dict(zip(cls.NAMES, row.tolist(), strict=True))
        loss, sample_loss = values.pop("loss"), values.pop("sample_loss")
        return {
            "loss": loss / max(values["trained_tokens"], 1),
            "sample_loss": sample_loss / max(values["conversations"], 1),
            **{name: round(value) for name, value in values.items()},
        }


@dataclass(frozen=True)
class Report:
    """What a micro-batch adds to the metrics of its source.

    `weights` (2, batch, length) give each position's share of `loss` (1 if trained) and of `sample_loss` (1 a
    conversation). Under context parallelism the parts of the ranks add up.
    """

    weights: Tensor
    counts: Counts
    source: int = 0
    num_sources: int = 1

    @property
    def tokens(self) -> int:
        """Positions of this rank that are not padding."""
        return int(self.counts.tokens)

    def sums(self, losses: Tensor) -> Sums:
        """The sums of this micro-batch from the loss of each position (batch, length)."""
        sums = Sums.zeros(self.num_sources, losses.device)
        loss, sample_loss = (losses.detach() * self.weights).sum((1, 2)).double()
        sums["loss"][self.source] = loss
        sums["sample_loss"][self.source] = sample_loss
        for name, count in self.counts._asdict().items():
            sums[name][self.source].fill_(count)  # a copy from the host would wait for the GPU
        return sums


@dataclass
class Totals:
    """What a training adds up between two lines of metrics."""

    sums: Sums = field(default_factory=lambda: Sums.zeros(1))
    steps: float = 0.0
    load_balancing: float = 0.0  # sum over steps of the routers' loss
    mtp: list[float] = field(default_factory=list)  # by depth, sum over steps of the mean loss of a token

    def add(self, sums: Sums, load_balancing: float, mtp: list[float]) -> None:
        """Add a step; `mtp` has the mean loss of each depth of multi-token prediction."""
        self.sums = self.sums + sums
        self.steps += 1
        self.load_balancing += load_balancing
        self.mtp = [total + loss for total, loss in zip(self.mtp or [0.0] * len(mtp), mtp, strict=True)]

    def clear(self) -> None:
        self.sums.values.zero_()
        self.steps, self.load_balancing, self.mtp = 0.0, 0.0, [0.0] * len(self.mtp)

    def saved(self) -> dict[str, list]:
        """As checkpoints hold them."""
        return {"sums": self.sums.values.tolist(), "means": [self.steps, self.load_balancing, *self.mtp]}

    @classmethod
    def of_saved(cls, progress: dict[str, Any]) -> Totals:
        steps, load_balancing, *mtp = progress["means"]
        return cls(Sums(torch.tensor(progress["sums"], dtype=torch.float64)), steps, load_balancing, mtp)


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Compute a micro-batch; megatron-core's schedules call this.

    They divide all gradients, those of the load balancing loss too, by the step's tokens without padding. The
    weights of the other losses are made for that.
    """
    batch = next(batches)
    report: Report = batch.pop("report")
    weights = batch["loss_mask"][0]

    def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, Sums]:
        """The weighted sum, the tokens, and what is reported."""
        losses = losses.float()
        # Not torch.tensor: that copies from the host, which waits for the GPU.
        tokens = torch.full((), report.tokens, dtype=torch.int, device=losses.device)
        return (losses * weights).sum(), tokens, report.sums(losses)

    return model(attention_mask=None, **batch), loss_function


def compute(
    module: torch.nn.Module,
    batches: Iterator[Batch],
    *,
    count: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool = False,
    schedule: backend.Schedule | None = None,
) -> list[Sums]:
    """Compute `count` micro-batches, and their gradients unless `forward_only`.

    `schedule` computes them (`backend.schedule`), or megatron-core's if none is given. Returns the sums of
    each micro-batch on the last pipeline stage, and nothing on the others.
    """
    return (schedule or backend.schedule(recorded=False))(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[module],
        num_microbatches=count,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def sum_over_ranks(outputs: list[Sums], num_sources: int, mtp: Tensor | None = None) -> tuple[Sums, Tensor]:
    """The sums of all micro-batches and `mtp` (depths,), summed over all ranks, on all of them in float64."""
    sums = Sums.zeros(num_sources).values
    shape = sums.shape
    if outputs:
        sums = torch.stack([one.values for one in outputs]).sum(0)
    mtp = torch.zeros(0) if mtp is None else mtp
    total = torch.cat([x.flatten().double().to(backend.device()) for x in (sums, mtp)])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=group)
    # The last rank is in the last pipeline stage, which has the losses.
    torch.distributed.broadcast(total, src=torch.distributed.get_world_size() - 1)
    found, mtp = total.cpu().split([shape.numel(), len(mtp)])
    return Sums(found.reshape(shape)), mtp
