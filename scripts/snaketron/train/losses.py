"""The losses of micro-batches: how they are computed, summed up over ranks and steps, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from snaketron.model import backend

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad

Batch = dict[str, Any]  # keyword arguments of the model, and `report`


class Counts(NamedTuple):
    """What a micro-batch counts, beside its losses."""

    trained_tokens: float
    conversations: float
    tokens: float
    packs: float

    def tensor(self) -> Tensor:
        """The counts (4,), float64, on the host."""
        return torch.tensor(self, dtype=torch.float64)


@dataclass
class Sums:
    """Sums by source and name: `values` is (sources, names), float64, and `sums["loss"]` (sources,) a view.

    `loss` is the sum over trained tokens, and `sample_loss` that over conversations of each one's mean.

    Sums are `mixed` where sequences of several sources share a micro-batch. Their `values`, (1 + sources,
    names), begin with a row over all sources: float32 adds up the losses of a micro-batch, so the sum of the
    sources may be another one in its last bits.
    """

    NAMES = ("loss", "trained_tokens", "sample_loss", "conversations", "tokens", "packs")

    values: Tensor
    mixed: bool = False

    @classmethod
    def zeros(cls, num_sources: int, *, mixed: bool = False) -> Sums:
        """Sums of nothing, with a row for each source; one row where metrics know no sources."""
        rows = 1 + num_sources if mixed else max(1, num_sources)
        return cls(torch.zeros(rows, len(cls.NAMES), dtype=torch.float64), mixed)

    @property
    def by_source(self) -> Tensor:
        """The rows of the sources (sources, names), a view."""
        return self.values[1:] if self.mixed else self.values

    def __getitem__(self, name: str) -> Tensor:
        return self.by_source[:, self.NAMES.index(name)]

    def __add__(self, other: Sums) -> Sums:
        """The sum, in which a row that one of them lacks counts nothing there."""
        rows = max(len(self.values), len(other.values))
        one, two = (pad(v, (0, 0, 0, rows - len(v))) for v in (self.values, other.values))
        return Sums(one + two, self.mixed or other.mixed)

    def total(self, name: str) -> Tensor:
        """The sum over all sources, ()."""
        return self._totals()[self.NAMES.index(name)]

    def _totals(self) -> Tensor:
        """The sums over all sources (names,)."""
        return self.values[0] if self.mixed else self.values.sum(0)

    def means(self) -> dict[str, Any]:
        """Over all sources: losses as means, counts as they are."""
        return self._means(self._totals())

    def means_of(self, source: int) -> dict[str, Any]:
        """Like `means`, of one source; where they are mixed, its samples are sequences of trained tokens."""
        means = self._means(self.by_source[source])
        if self.mixed:
            return {
                "loss": means["loss"],
                "trained_tokens": means["trained_tokens"],
                "samples": means["packs"],
            }
        return means

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
    """What a micro-batch adds to the metrics of its sources.

    All that differs from one micro-batch to the next is in tensors on the device, which a recording of the
    first one reads anew.

    `weights` (2, batch, length) give each position's share of `loss` (1 if trained) and of `sample_loss` (1 a
    conversation). `counts` (4,), float64, is `Counts` of the whole micro-batch; each of its sequences has an
    equal part. Under context parallelism the parts of the ranks add up. `source` (batch,) has the number of
    each sequence's source; unless they are `mixed`, all have one.
    """

    weights: Tensor
    counts: Tensor
    source: Tensor
    num_sources: int = 1
    mixed: bool = False

    @property
    def tokens(self) -> Tensor:
        """Positions of this rank that are not padding, () int32."""
        return self.counts[Counts._fields.index("tokens")].int()

    def sums(self, losses: Tensor) -> Sums:
        """The sums of this micro-batch from the loss of each position (batch, length)."""
        weighted = losses.detach() * self.weights
        total = self._row(weighted.sum((1, 2))[:, None], 1)
        if not self.mixed:
            return Sums(torch.where(self._of_source(self.source[:1]), total, 0.0)[:, 0])
        rows = self._row(weighted.sum(2), len(self.source))
        # Not index_add, which adds up in any order on a GPU.
        by_source = torch.where(self._of_source(self.source), rows, 0.0).sum(1)
        return Sums(torch.cat([total, by_source]), mixed=True)

    def _of_source(self, source: Tensor) -> Tensor:
        """Whether a sequence is of a source, (sources, sequences, 1)."""
        return (source == torch.arange(max(1, self.num_sources), device=source.device)[:, None])[..., None]

    def _row(self, losses: Tensor, parts: int) -> Tensor:
        """Losses (2, rows) and an equal part of the counts in the order of `Sums.NAMES`: (rows, names)."""
        loss, sample_loss = losses.double()
        trained_tokens, conversations, tokens, packs = (self.counts / parts).expand(len(loss), -1).T
        columns = {
            "loss": loss,
            "trained_tokens": trained_tokens,
            "sample_loss": sample_loss,
            "conversations": conversations,
            "tokens": tokens,
            "packs": packs,
        }
        return torch.stack([columns[name] for name in Sums.NAMES], 1)


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
        """Begin anew, in the same tensors."""
        self.sums.values.zero_()
        self.steps, self.load_balancing, self.mtp = 0.0, 0.0, [0.0] * len(self.mtp)

    def saved(self) -> dict[str, list]:
        """As checkpoints hold them. Mixed sources are apart, and left out where there is nothing of them."""
        values, mixed = self.sums.values, self.sums.mixed
        return {
            "sums": (values[:1] if mixed else values).tolist(),
            "means": [self.steps, self.load_balancing, *self.mtp],
            **({"sources": values[1:].tolist()} if mixed and values[1:].any() else {}),
        }

    @classmethod
    def of_saved(cls, progress: dict[str, Any]) -> Totals:
        """What a checkpoint holds."""
        steps, load_balancing, *mtp = progress["means"]
        values = torch.tensor([*progress["sums"], *progress.get("sources", ())], dtype=torch.float64)
        return cls(Sums(values, mixed="sources" in progress), steps, load_balancing, mtp)


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
        return (losses * weights).sum(), report.tokens, report.sums(losses)

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


def sum_over_ranks(
    outputs: list[Sums], num_sources: int, mtp: Tensor | None = None, *, mixed: bool = False
) -> tuple[Sums, Tensor]:
    """The sums of all micro-batches and `mtp` (depths,), summed over all ranks, on all of them in float64.

    `num_sources` and `mixed` are those of the outputs, which only some ranks have.
    """
    sums = Sums.zeros(num_sources, mixed=mixed).values
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
    return Sums(found.reshape(shape), mixed), mtp
