"""Small checkpoints in Megatron's format, written without a model."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import Model
from snaketron.huggingface import torch_dist
from snaketron.huggingface.names import VOCABULARY, megatron_tensors, tensors
from snaketron.huggingface.save import Checkpoint, export
from snaketron.lineage.record import Entry

import torch

TOKENS, ROWS = 200, 256  # of the vocabulary: without and with padding
MODEL = Model(
    hybrid_layer_pattern="ME*-",
    hidden_size=16,
    ffn_hidden_size=24,
    mtp_num_layers=2,
    mtp_hybrid_layer_pattern="*E",
    num_attention_heads=4,
    kv_channels=4,
    mamba_num_heads=4,
    mamba_head_dim=4,
    mamba_state_dim=4,
    num_moe_experts=4,
    moe_ffn_hidden_size=8,
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=12,
)


def values(model: Model = MODEL, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors of a whole checkpoint, by key."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for tensor in megatron_tensors(tensors(model, TOKENS), dict.fromkeys(VOCABULARY, ROWS)):
        if tensor.key not in found:
            made = torch.randn(tensor.shape, generator=generator)
            found[tensor.key] = made if tensor.fp32 else made.to(dtype)
    return found


def write(directory: Path, found: dict[str, torch.Tensor]) -> Path:
    """Write tensors as a checkpoint of Megatron."""
    directory.mkdir(parents=True)
    chunks = [
        torch_dist.Chunk(key, tuple(tensor.shape), tensor.dtype, None, lambda tensor=tensor: tensor)
        for key, tensor in found.items()
    ]
    torch_dist.write(directory, chunks, {"iteration": 1})
    return directory


def export_of(
    directory: Path, output: Path, model: Model = MODEL, tokenizer: Path = Path(), **options: int
) -> Path:
    """Export a checkpoint that `write` wrote."""
    checkpoint = Checkpoint(
        tensors=directory,
        tokenizer=tokenizer,
        model=model,
        seq_length=64,
        vocab_size=TOKENS,
        eos_token_ids=[0, 3],
        pad_token_id=1,
    )
    export(checkpoint, output, source=Entry("checkpoint", "ckpt", version="one"), card="# one\n", **options)
    return output


def files(directory: Path) -> dict[str, bytes]:
    """The bytes of everything but the record, which has times."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    found.pop("record.json", None)
    return found
