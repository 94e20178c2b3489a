"""Whether a configuration has a job, by its log: one of a corpus or a file that was taken out stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import PurePath

from snaketron.config import Config
from snaketron.sources.lockfile import read_lock
from snaketron.sources.shards import all_shards

type Names = Mapping[str, Collection[str] | None]  # of the shards of each source; None where not known

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
    found, rendered, _ = all_shards(config, read_lock(config.sources_lock, assuming=True))
    # None: its files are neither here nor in the lock file.
    text: Names = {corpus.name: found.get(corpus.name) for corpus in config.corpora}
    chats: Names = {source.name: rendered.get(source.name) for source in config.chats}
    packed: Names = dict.fromkeys(chats, ("all",)) if config.sft_data.pack_across_shards else chats
    phases: Names = {phase.name: None for phase in config.pretrain.phases}
    by_rule = dict.fromkeys(OF_TEXT, text) | dict.fromkeys(OF_CHATS, chats) | dict.fromkeys(OF_PHASES, phases)
    by_rule["pack_sft"] = packed

    def is_asked(log: str) -> bool:
        rule, *wildcards = PurePath(log).with_suffix("").parts
        if rule not in by_rule or not wildcards:
            return True
        known = by_rule[rule].get(wildcards[0], ())
        return known is None or wildcards[-1] in known

    return is_asked
