"""The loss of a model on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from snaketron.config.data import Split
from snaketron.model.build import BuiltModel
from snaketron.model.megatron import internals
from snaketron.train.batches import Batches
from snaketron.train.losses import Batch, Sums, compute, sum_over_ranks

AT_ONCE = 8  # micro-batches for each stage of the pipeline, which empties after them


def evaluate(
    built: BuiltModel, batches: Batches, split: Split, *, give_up: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Mean loss of a token, in nats, over the same samples each time; equal on all ranks.

    None where `give_up` says so on the way; all ranks call it at the same time.
    The key is `<split>_loss`. `<split>_sources` has the loss of a token of each source, or corpus. With
    conversations there is also `<split>_sample_loss`, the mean over conversations of each one's mean.
    """
    count = batches.round_up(built.run.eval_samples)
    left, outputs = batches.num_micro_batches(count), list[Sums]()
    micro_batches = _alive(built, batches.micro_batches(split, 0, count))
    with built.evaluating(), internals.without_recordings():
        while left:
            if give_up():
                return None
            now = min(left, AT_ONCE * built.run.parallel.pipeline_model_parallel_size)
            outputs += compute(
                built.module,
                micro_batches,
                count=now,
                micro_batch_size=batches.micro_batch_size,
                seq_length=built.settings.seq_length,
                forward_only=True,
            )
            left -= now
    sums, _ = sum_over_ranks(outputs, len(batches.sources), mixed=batches.mixed)
    total = sums.means()
    found: dict[str, Any] = {f"{split}_loss": total["loss"]}
    if batches.sources:
        if not batches.mixed:
            found[f"{split}_sample_loss"] = total["sample_loss"]
        found[f"{split}_sources"] = {
            name: sums.means_of(source)["loss"]
            for source, name in enumerate(batches.sources)
            if sums["trained_tokens"][source]
        }
    return found


def _alive(built: BuiltModel, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in micro_batches:
        built.alive()
        yield batch
