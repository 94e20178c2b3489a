"""Whether a configuration has a job, by its log: one of a corpus or a file that was taken out stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from snaketron.config import ChatSource, Config, ConfigError, Corpus
from snaketron.sources.lockfile import read_lock
from snaketron.sources.shards import shards

OF_TEXT = (
    "filter_shard",
    "exact_signature",
    "minhash_signature",
    "curate_shard",
    "tokenize_shard",
    "register_tokens",
)
OF_CHATS = ("render_chat", "pack_sft", "register_packs")
OF_PHASES = ("blend_pretrain", "index_pretrain", "pretrain", "register_checkpoint", "merge_checkpoints")


def asked(config: Config) -> Callable[[str], bool]:
    """Answers for `tokenize_shard/docs/part_0.log`; yes where the names of a rule's jobs are not known."""
    lock = read_lock(config.sources_lock)
    lock.assuming = True

    def names(source: Corpus | ChatSource, where: str, size: int | None) -> set[str] | None:
        try:
            return {*shards(source, where, lock, size)}
        except ConfigError:
            return None  # its files are neither here nor in the lock file

    text = {c.name: names(c, "corpora", config.pretrain_data.shard_size) for c in config.corpora}
    chats = {c.name: names(c, "chats", config.sft_data.shard_size) for c in config.chats}
    across = config.sft_data.pack_across_shards
    packed: dict[str, set[str] | None] = {name: {"all"} for name in chats} if across else chats
    phases: dict[str, set[str] | None] = {phase.name: None for phase in config.pretrain.phases}
    by_rule = dict.fromkeys(OF_TEXT, text) | dict.fromkeys(OF_CHATS, chats) | dict.fromkeys(OF_PHASES, phases)
    by_rule["pack_sft"] = packed

    def is_asked(log: str) -> bool:
        rule, *wildcards = PurePath(log).with_suffix("").parts
        if rule not in by_rule or not wildcards:
            return True
        known = by_rule[rule].get(wildcards[0], set())
        return known is None or wildcards[-1] in known

    return is_asked
