"""Export adapters: from Megatron's tensors to a directory that PEFT reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from snaketron.config import Adapters
from snaketron.files import writing_directory
from snaketron.huggingface import shards
from snaketron.huggingface.metadata import megatron_differences
from snaketron.huggingface.names import megatron_tensors
from snaketron.huggingface.peft import Factor, adapter_config, factors, refused
from snaketron.huggingface.save import Checkpoint, Rows, listed, small_files
from snaketron.huggingface.torch_dist import Reader
from snaketron.lineage.record import Entry, Record, making
from snaketron.log import UserError, logger

import torch

_CARD = """---
library_name: peft
base_model: {base}
tags:
- snaketron
---
# Adapters of {base}

```python
from peft import AutoPeftModelForCausalLM
from transformers import GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY")
model.generation_config = GenerationConfig.from_pretrained("DIRECTORY")  # where answers end
```

This loads `{base}` first, by `base_model_name_or_path` of `adapter_config.json`, so it must be there. Where
it is a checkpoint of Snaketron, `snakemake {base}` exports it.
"""
_LEFT_OUT = """
{count} tensors of the adapters of multi-token prediction are left out, because transformers does not compute
it. The logits do not depend on them.
"""


def export_adapters(
    checkpoint: Checkpoint, adapters: Adapters, output: Path, *, base: str, source: Entry
) -> Record:
    """Write the directory `output`, complete or not at all; returns its record.

    Args:
        checkpoint: that holds the adapters alone.
        base: the exported model that they belong to, as transformers is to load it.
        source: the checkpoint, for the record.

    Raises:
        UserError: PEFT cannot express the adapters, or the checkpoint does not hold them.
    """
    if problems := refused(adapters, checkpoint.model):
        raise UserError("\n".join(problems))
    reader = Reader(checkpoint.tensors)
    found = factors(checkpoint.model, adapters)
    held = megatron_tensors((factor.tensor for factor in found), {})
    if problems := megatron_differences(reader.listed, held, None):
        raise UserError(listed(f"{checkpoint.tensors} does not hold the adapters of its settings:", problems))
    kept = {factor.tensor.name: factor for factor in found if factor.is_computed}
    left_out = len(found) - len(kept)
    begun = time.monotonic()
    with writing_directory(output) as aside:
        rows = Rows(reader)
        described = [
            shards.Described(name, factor.shape, reader.tensors[factor.tensor.parts[0].key][1])
            for name, factor in kept.items()
        ]
        weights = shards.write_shard(
            aside / "adapter_model.safetensors", described, lambda name: _made(kept[name], rows)
        )
        rows.check()
        card = _CARD.format(base=base) + (_LEFT_OUT.format(count=left_out) if left_out else "")
        values = adapter_config(adapters, found, base)
        entries = [weights, *small_files(checkpoint, aside, "adapter_config.json", values, card)]
        with making("export", output.name, outputs={}, record=aside / "record.json") as job:
            job.present = [Entry(e.name, str(output / e.name), e.sha256, e.bytes) for e in entries]
            job.inputs = {"checkpoint": source}
            job.settings = {"model": checkpoint.model.model_dump(), "lora": adapters.model_dump()}
            job.counts = _counts(described, left_out, time.monotonic() - begun)
    if left_out:
        logger.warning("%s: %d tensors of multi-token prediction are left out", output, left_out)
    logger.info("%s: %d tensors of adapters of %s", output, len(kept), base)
    return job.record


def _made(factor: Factor, rows: Rows) -> torch.Tensor:
    plain = rows.of(factor.tensor)
    if not factor.experts:
        return plain
    # (experts * outputs, rank) to (outputs, rank * experts)
    return plain.unflatten(0, (factor.experts, -1)).permute(1, 2, 0).reshape(factor.shape)


def _counts(described: list[shards.Described], left_out: int, seconds: float) -> dict[str, Any]:
    size = sum(tensor.bytes for tensor in described)
    return {
        "tensors": len(described),
        "left_out_of_multi_token_prediction": left_out,
        "bytes": size,
        "bytes_per_second": round(size / max(seconds, 1e-9)),
    }
