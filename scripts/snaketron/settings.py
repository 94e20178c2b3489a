"""From the configuration to what one training needs: what defines its result, and how it is run.

The first part is a `params` of the rule, so a change trains again; the second is not.
"""

from __future__ import annotations

from typing import Any, Literal

from snaketron.config import Config, Pretrain, Run, Sft


def pretrain_settings(config: Config, name: str) -> dict[str, Any]:
    """What defines the result of a pretraining phase, as JSON values.

    A phase that ends before the decay begins does not depend on how long the curriculum is, so a longer
    curriculum does not train it again.
    """
    pretrain = config.pretrain
    index = [p.name for p in pretrain.phases].index(name)
    iters, batch, length = pretrain.steps(pretrain.phases[index])
    spans = pretrain.spans()
    (start, end), total = spans[index], spans[-1][1]
    decays = total - pretrain.decay_tokens < end
    return {
        "stage": f"pretrain/{name}",
        "seed": config.seed,
        "model": config.model.model_dump(),
        "optimizer": pretrain.optimizer.model_dump(),
        "seq_length": length,
        "global_batch_size": batch,
        "train_iters": iters,
        "schedule": {
            "style": "WSD",
            "start": start,
            "warmup": pretrain.warmup_tokens,
            "end": total if decays else end,
            "decay": pretrain.decay_tokens if decays else 0,
            "increment": batch * length,
        },
    }


def sft_settings(config: Config) -> dict[str, Any]:
    """What defines the result of SFT, as JSON values."""
    sft = config.sft
    return {
        "stage": "sft",
        "seed": config.seed,
        "model": config.model.model_dump(),
        "optimizer": sft.optimizer.model_dump(),
        "seq_length": config.sft_data.pack_size,
        "global_batch_size": sft.global_batch_size,
        "train_iters": sft.train_iters,
        "schedule": {
            "style": "cosine",
            "start": 0,
            "warmup": sft.warmup_iters,
            "end": sft.train_iters,
            "decay": 0,
            "increment": 1,
        },
    }


def run_settings(config: Config, section: Literal["pretrain", "sft"]) -> dict[str, Any]:
    """How a stage is run: keys that do not change its result."""
    run: Pretrain | Sft = getattr(config, section)
    settings = {name: getattr(run, name) for name in Run.model_fields if name != "parallel"}
    settings |= {"parallel": run.parallel.model_dump(), "tracking": config.tracking}
    if isinstance(run, Sft):
        settings |= {"num_samples": run.num_samples, "sample_tokens": run.sample_tokens}
    return settings
