"""The loss of a model on held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snaketron.model.build import BuiltModel
from snaketron.model.megatron import internals
from snaketron.train.batches import Batches, Split
from snaketron.train.losses import Batch, compute, sum_over_ranks


def evaluate(built: BuiltModel, batches: Batches, split: Split) -> dict[str, Any]:
    """Mean loss of a token, in nats, over the same samples each time; equal on all ranks.

    The key is `<split>_loss`. `<split>_sources` has the loss of a token of each source, or corpus. With
    conversations there is also `<split>_sample_loss`, the mean over conversations of each one's mean.
    """
    count = batches.round_up(built.run.eval_samples)
    with built.evaluating(), internals.without_recordings():
        outputs = compute(
            built.module,
            _alive(built, batches.micro_batches(split, 0, count)),
            count=batches.num_micro_batches(count),
            micro_batch_size=batches.micro_batch_size,
            seq_length=built.settings.seq_length,
            forward_only=True,
        )
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
