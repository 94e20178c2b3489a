"""Training: the loop and what it needs, on megatron-core's own parts."""
