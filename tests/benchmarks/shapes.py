"""The models and tokens of benchmarks on GPUs."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

VOCABULARY = 131072
MODEL = {
    "hybrid_layer_pattern": "MEMEM*EMEMEM*EMEMEM*EMEME",
    "mtp_hybrid_layer_pattern": "*E",
    "mtp_num_layers": 2,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 2,
    "kv_channels": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "num_moe_experts": 64,
    "moe_router_topk": 6,
    "moe_ffn_hidden_size": 1344,
    "moe_latent_size": 512,
    "moe_shared_expert_intermediate_size": 2688,
    "init_method_std": 0.02,
    "precision": "bf16",
}
SUPER = {  # 11 of 88 layers and 64 of 512 experts
    "hybrid_layer_pattern": "MEMEMEM*EME",
    "mtp_hybrid_layer_pattern": "*E",
    "mtp_num_layers": 1,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 2,
    "kv_channels": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "num_moe_experts": 64,
    "moe_router_topk": 22,
    "moe_ffn_hidden_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "init_method_std": 0.02,
    "precision": "bf16",
}
NANO = {  # all 52 layers, and 16 of 128 experts
    "hybrid_layer_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mtp_num_layers": 0,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_query_groups": 2,
    "kv_channels": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "num_moe_experts": 16,
    "moe_router_topk": 6,
    "moe_ffn_hidden_size": 1856,
    "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": 3712,
    "init_method_std": 0.02,
    "precision": "bf16",
}
QUARTER = SUPER | {"hybrid_layer_pattern": "MEMEMEM*EMEMEMEM*EMEME", "num_moe_experts": 512}  # of Super
BF16_STATE = {"gradient_precision": "bf16", "moment_precision": "bf16"}
SLICE = {"micro_batch_size": 1, "optimizer": BF16_STATE}
SLICES = {
    "super_8k": SLICE | {"of": SUPER, "length": 8192, "micro_batches": 2},
    "super_4k": SLICE | {"of": SUPER, "length": 4096, "micro_batches": 4},
    "nano_8k": SLICE | {"of": NANO, "length": 8192, "micro_batches": 4},
    "nano_4k": SLICE | {"of": NANO, "length": 4096, "micro_batches": 8},
}
FP8 = ("fp8_current", "fp8_blockwise", "fp8_delayed")


def text_tokens(count: int) -> list[int]:
    """The first tokens of the sources of Python's standard library: a word, a space or a sign is one.

    A token's number is the order of its first appearance, so that frequent ones have small numbers. Their
    frequencies fall as in any text whose tokens are words; what comes after 131,072 others is one of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    known: dict[str, int] = {}
    tokens: list[int] = []
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        for piece in re.findall(r"\w+|\s+|[^\w\s]", path.read_text("utf-8", "replace")):
            tokens.append(known.setdefault(piece, len(known)) % VOCABULARY)
        if len(tokens) >= count:
            return tokens[:count]
    raise ValueError(f"{library} has {len(tokens)} tokens, and {count} are wanted")
