"""README.md of an export, which the hub shows as the model's card."""

from __future__ import annotations

from collections.abc import Iterable

from snaketron.config import Model
from snaketron.lineage.record import Entry, Record
from snaketron.sizes.parameters import num_active_parameters, num_parameters

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- nemotron_h
- snaketron
---
"""
_USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

`config.json` sets `time_step_min` to 1e-12. transformers clamps the time step of Mamba-2 there, and the model
was trained without a clamp: with the usual 0.001 its logits are others. transformers does not compute
multi-token prediction, whose weights are here under `mtp.`; vLLM drafts with them.
"""


def card(
    record: Record, model: Model, vocab_size: int, made_from: Iterable[Record], lost: Iterable[Entry]
) -> str:
    """Markdown about an exported checkpoint.

    Args:
        made_from: the records of the checkpoints before it.
        lost: those of them whose records are gone.
    """
    total = num_parameters(model, vocab_size).total
    active = num_active_parameters(model, vocab_size)
    rows = [
        ("layers", f"`{model.hybrid_layer_pattern}` (M Mamba-2, E experts, * attention, - dense)"),
        ("parameters", f"{total:,}, of which a token uses {active:,}"),
        ("hidden size", f"{model.hidden_size:,}"),
        ("routed experts", f"{model.num_moe_experts}, {model.moe_router_topk} for a token"),
        ("tokens of the vocabulary", f"{vocab_size:,}"),
        ("precision of the training", model.precision),
    ]
    trained = ["| training | steps | tokens | test loss | version |", "|---|--:|--:|--:|---|"]
    for entry in lost:
        stage = entry.version.rpartition("-")[0]
        trained.append(f"| {stage} | - | - | - | {entry.version}, whose record is gone |")
    for one in [*made_from, record]:
        loss = one.counts.get("test_loss")
        trained.append(
            f"| {one.name} | {one.counts.get('iterations', 0):,} | {one.counts.get('tokens', 0):,} "
            f"| {'-' if loss is None else f'{loss:.4f}'} | {one.version} |"
        )
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([_HEAD, f"# {record.name}", "", *table, "", *trained, _USE])
