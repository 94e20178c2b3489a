"""Models whose sizes are known: published, or small enough to count by hand."""

from snaketron.config import Model, Optimizer, Run
from snaketron.sizes.work import Work

SUPER = Model(
    hybrid_layer_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=2,
    kv_channels=128,
    mamba_num_heads=128,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    num_moe_experts=512,
    moe_router_topk=22,
    moe_ffn_hidden_size=2688,
    moe_latent_size=1024,
    moe_shared_expert_intermediate_size=5376,
    mtp_num_layers=2,
    mtp_hybrid_layer_pattern="*E",
    precision="bf16",
)
VOCABULARY_OF_SUPER = 131072

# The small model of many tests, and its tuning: their numbers were found for it, whatever the defaults are.
SMALL = {
    "hybrid_layer_pattern": "MEM*EME",
    "num_attention_heads": 8,
    "kv_channels": 16,
    "mtp_num_layers": 2,
    "mtp_hybrid_layer_pattern": "*E",
    "init_method_std": 0.02,
}
COUNTED = {"model": SMALL, "sft": {"global_batch_size": 2}}


HAND = Model(
    mtp_num_layers=2,
    mtp_hybrid_layer_pattern="*E",
    hidden_size=10,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    ffn_hidden_size=7,
    mamba_num_heads=2,
    mamba_head_dim=4,
    mamba_num_groups=1,
    mamba_state_dim=5,
    num_moe_experts=6,
    moe_router_topk=2,
    moe_ffn_hidden_size=9,
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=11,
    make_vocab_size_divisible_by=16,
)


def work(
    model: Model,
    run: Run | None = None,
    *,
    vocab_size: int = 16,
    length: int = 96,
    optimizer: Optimizer | None = None,
) -> Work:
    """A training of a model on sequences of a length."""
    return Work(model, vocab_size, length, 1, run or Run(), optimizer or Optimizer())
