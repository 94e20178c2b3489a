"""Everything that replaces or corrects a piece of megatron-core; `replacements` has the table."""
