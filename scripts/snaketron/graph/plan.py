"""The plan of a configuration, without data and without Snakemake's graph: jobs, data, trainings, disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from snaketron.config import ChatSource, Config, Corpus, Phase, Training
from snaketron.graph.base import Base, BaseGraph
from snaketron.graph.disk import disk, made, raw_bytes
from snaketron.graph.planned import (
    Plan,
    PlannedChats,
    PlannedCorpus,
    PlannedStep,
    PlannedTime,
    PlannedTraining,
    Taken,
)
from snaketron.lineage.record import read
from snaketron.log import UserError
from snaketron.settings.keeping import kept_at_end
from snaketron.settings.schedule import steady_steps
from snaketron.settings.training import train_settings
from snaketron.sizes.fitting import no_change, smallest_change
from snaketron.sizes.gpus import of_cluster
from snaketron.sizes.layout import layout
from snaketron.sizes.plan import Estimate, estimate, hours_at
from snaketron.sizes.recording import work
from snaketron.sizes.speed import flops_per_token
from snaketron.sizes.stages import pipeline_stages
from snaketron.sizes.step import step_time
from snaketron.sizes.traffic import traffic
from snaketron.sources.lockfile import Lock, read_lock, request
from snaketron.sources.models import tokenizer_model
from snaketron.sources.pairs import SIZES, dtype_of
from snaketron.sources.shards import SAMPLE, Shards, all_shards

BYTES_OF_TOKEN = 4.4  # of English text and code with a vocabulary of 131,072, roughly
PACKED = 2.5  # bytes of text in a byte of a compressed file or of Parquet, roughly
PLAIN = (".jsonl", ".ndjson", ".json", ".arrow")


def plan(config: Config) -> Plan:
    """The plan as JSON takes it."""
    lock = read_lock(config.sources_lock, assuming=True)
    text, chats, wrong = all_shards(config, lock)
    corpora = {
        c.name: _corpus(config, c, text.get(c.name), lock)
        for c in _used_corpora(config, config.pretrain.phases)
    }
    trained = {phase.name for phase in _trained(config)}
    trainings = [
        _training(config, training, corpora)
        for training in config.trainings()
        if training.section != "pretrain" or training.phase in trained
    ]
    trained_on = {c.name: corpora[c.name] for c in _used_corpora(config, _trained(config))}
    conversations = {
        c.name: _conversations(config, c, chats.get(c.name), lock)
        for c in config.chats
        if c.name in {entry.source for entry in config.sft.blend}
    }
    return {
        "jobs": jobs(config, text, chats, lock),
        "not_listed": [
            source.name
            for where, source in config.sources()
            if where in wrong or source.name in lock.unlisted
        ],
        "missing": {
            source.name: str(wrong[where])
            for where, source in config.sources()
            if where in wrong and request(source) is None
        },
        "corpora": corpora,
        "trainings": trainings,
        "disk": disk(config, trained_on, conversations, trainings),
    }


def _trained(config: Config) -> list[Phase]:
    """The phases of pretraining that are trained here: those after one whose checkpoint is given.

    There are none where SFT begins with a base.
    """
    phases = [] if config.sft.base else config.pretrain.phases
    given = [i for i, phase in enumerate(phases) if phase.checkpoint]
    return phases[given[-1] + 1 :] if given else phases


def _used_corpora(config: Config, phases: Sequence[Phase]) -> list[Corpus]:
    used = {entry.corpus for phase in phases for entry in phase.blend}
    return [corpus for corpus in config.corpora if corpus.name in used]


# --------------------------------------------------------------------------------------------------- jobs


def jobs(config: Config, text: Shards, chats: Shards, lock: Lock) -> dict[str, int]:
    """The jobs of `ckpt/sft` from nothing, by rule; a source of unknown files counts as one shard."""
    counts: Counter[str] = Counter(build_tokenizer=1, install_chat_template=1, blend_sft=1, sft=1)
    phases, bases = len(_trained(config)), _bases(config, lock)
    counts.update(blend_pretrain=phases, index_pretrain=phases, pretrain=phases)
    counts.update(
        "import_base" if base.keys[0].endswith(".base") else "register_checkpoint" for base in bases
    )
    sources = {entry.source for entry in config.sft.blend}
    registered = {source.name for source in config.chats if source.registered}
    used: list[tuple[str, Mapping[str, Sequence[str]]]] = []
    for corpus in _used_corpora(config, _trained(config)):
        found = text.get(corpus.name) or {"?": []}
        used.append(("sample_corpus", found))
        counts["register_tokens" if corpus.registered else "tokenize_shard"] += len(found)
        if corpus.curation:
            counts.update(filter_shard=len(found), curate_shard=len(found))
            counts["exact_signature"] += len(found) if corpus.curation.exact_dedup else 0
            counts["minhash_signature"] += len(found) if corpus.curation.minhash_dedup else 0
    counts["download_model"] = len(_files_of_models(config, bases, lock))
    counts.update(_curation_of_groups(config))
    for source in sorted(sources):
        found = chats.get(source) or {"?": []}
        used.append(("sample_chat", found))
        if source in registered:
            counts["register_packs"] += len(found)
            continue
        counts["render_chat"] += len(found)
        counts["pack_sft"] += 1 if config.sft_data.pack_across_shards else len(found)
    of_tokenizer = {"?": [] if config.tokenizer.path else config.tokenizer.text}
    counts.update(_made_raw_files([*used, ("sample_corpus", of_tokenizer)]))
    return {rule: number for rule, number in sorted(counts.items()) if number}


def _bases(config: Config, lock: Lock) -> list[Base]:
    """The checkpoints from elsewhere that `ckpt/sft` begins with: at most one, with the key that is used."""
    given = len(config.pretrain.phases) - len(_trained(config))
    key = f"pretrain.phases[{given - 1}].checkpoint" if given else "pretrain.base"
    key = "sft.base" if config.sft.base else key
    found = BaseGraph(config, lock).bases.values()
    used = [base._replace(keys=(key,)) for base in found if key in base.keys]
    # A base of this workflow is taken as it is; as the result of a phase it is registered.
    return [base for base in used if key.endswith(".checkpoint") or not base.is_of_this_workflow(config)]


def _files_of_models(config: Config, bases: Sequence[Base], lock: Lock) -> set[str]:
    """Files to download of the hub's models: as listed, else those that such models usually have."""
    models = [tokenizer_model(config), *(base.hub for base in bases)]
    return {path for model in models if model for path in model.files(lock)}


def _curation_of_groups(config: Config) -> Counter[str]:
    """Jobs of the groups of corpora that are compared with each other."""
    used = _used_corpora(config, _trained(config))
    curations = [corpus.curation for corpus in used if corpus.curation]
    exact = {c.exact_dedup for c in curations if c.exact_dedup}
    near = {c.minhash_dedup for c in curations if c.minhash_dedup}
    buckets = config.curation.minhash.num_buckets
    return Counter(
        exact_find=len(exact),
        minhash_buckets=buckets * len(near),
        minhash_cluster=len(near),
        decontamination_index=int(any(c.decontaminate for c in curations)),
    )


def _made_raw_files(used: Sequence[tuple[str, Mapping[str, Sequence[str]]]]) -> Counter[str]:
    """Jobs that make raw files: a job writes a whole source of the sample, and one downloads a file."""
    samples, downloads = set(), set()
    for rule, found in used:
        for path in (path for files in found.values() for path in files):
            if sample := SAMPLE.fullmatch(path):
                samples.add((rule, sample[1]))
            elif path.startswith("<data>/"):
                downloads.add(path)
    return Counter(rule for rule, _ in samples) + Counter(download=len(downloads))


# --------------------------------------------------------------------------------------------------- data


def _corpus(
    config: Config, corpus: Corpus, found: Mapping[str, Sequence[str]] | None, lock: Lock
) -> PlannedCorpus:
    """Shards and bytes of the raw files as far as they are known, and tokens once they are counted."""
    raw, estimated = _raw(corpus, found, lock)
    if corpus.registered and estimated is not None:
        estimated = _ids(config, found or {})
    return {
        "shards": len(found) if found is not None else None,
        "raw_bytes": raw,
        "train_tokens": _tokens(config, corpus.name, found) if found else None,
        "estimated_tokens": estimated,
        "registered": corpus.registered is not None,
    }


def _conversations(
    config: Config, source: ChatSource, found: Mapping[str, Sequence[str]] | None, lock: Lock
) -> PlannedChats:
    """Shards and bytes of the raw files, and of what is made from them once it is made."""
    raw, estimated = _raw(source, found, lock)
    data = Path(config.pathvars["data"])
    packed = ["all"] if config.sft_data.pack_across_shards else found
    if source.registered:  # packs of elsewhere are written once more, for the trainings
        copied = made(data / "sft" / source.name, found) if found else None
        return {
            "shards": len(found or {}),
            "raw_bytes": raw,
            "estimated_tokens": 0,
            "rendered_bytes": 0,
            "packed_bytes": raw if copied is None else copied,
        }
    return {
        "shards": len(found) if found is not None else None,
        "raw_bytes": raw,
        "estimated_tokens": estimated,
        "rendered_bytes": made(data / "chat" / source.name, found) if found else None,
        "packed_bytes": made(data / "sft" / source.name, packed) if found and packed else None,
    }


def _raw(
    source: Corpus | ChatSource, found: Mapping[str, Sequence[str]] | None, lock: Lock
) -> tuple[int | None, float | None]:
    """Bytes of the raw files of a source, and the tokens that they hold roughly; None where not known."""
    files = [path for of_shard in (found or {}).values() for path in of_shard]
    sizes = [raw_bytes(source.name, path, lock) for path in files]
    known = [size for size in sizes if size is not None]
    if found is None or len(known) < len(sizes):
        return None, None
    text = sum(n * (1 if f.lower().endswith(PLAIN) else PACKED) for f, n in zip(files, known, strict=True))
    return sum(known), None if source.limited else text / BYTES_OF_TOKEN


def _ids(config: Config, found: Mapping[str, Sequence[str]]) -> float:
    """The ids that the pairs to train on of a registered corpus hold, by the sizes of their files."""
    trained = [bin_file for shard, (bin_file, _) in found.items() if shard.startswith("train.")]
    return sum(Path(path).stat().st_size for path in trained) / SIZES[dtype_of(config.tokenizer.vocab_size)]


def _tokens(config: Config, corpus: str, found: Mapping[str, Sequence[str]]) -> int | None:
    """The training tokens of a corpus by the records of its shards; None unless all are tokenized."""
    root = Path(config.pathvars["data"]) / "tokens" / corpus
    try:
        return sum(read(root / f"{shard}.json").counts["train"]["tokens"] for shard in found)
    except (UserError, OSError):
        return None


# ---------------------------------------------------------------------------------------------- trainings


def _training(config: Config, training: Training, corpora: Mapping[str, PlannedCorpus]) -> PlannedTraining:
    needs = estimate(config, training)
    memory, limit = needs.memory, config.cluster.gpu_memory_gb if config.cluster.gpus_per_node else None
    parallel, lies = training.run.parallel, layout(training.run, config.cluster)
    stages = pipeline_stages(training.model, config.tokenizer.vocab_size, parallel)
    fits = None if limit is None else memory.total <= limit * 1e9
    change = smallest_change(config, training) if fits is False else None
    settings = train_settings(config, training.name)
    steady = steady_steps(settings.schedule, settings.optimizer, training.train_iters)
    return {
        "name": training.name,
        "on_request": training.on_request,
        "steps": training.train_iters,
        "tokens": training.tokens,
        "seq_length": training.seq_length,
        "global_batch_size": training.global_batch_size,
        "processes": parallel.world_size,
        "nodes": lies.nodes,
        "parallel": parallel.model_dump(),
        "layers_of_stages": [len(stage) for stage in stages],
        "parameters": needs.num_parameters,
        "active_parameters": needs.num_active_parameters,
        "adapter_parameters": needs.num_adapter_parameters,
        "flops_per_token": flops_per_token(config, training),
        "flops": needs.flops,
        **_time(training, needs),
        "memory": asdict(memory) | {"total": memory.total, "limit": limit and limit * 1e9, "fits": fits},
        "change_that_fits": change and change[0],
        "why_none_fits": no_change(training) if fits is False and not change else None,
        **_step(config, training),
        "checkpoint_bytes": needs.checkpoint_bytes,
        "checkpoints_kept": len(kept_at_end(training.run, steady, training.train_iters)),
        "corpora": _mix(config, training, corpora),
    }


def _step(config: Config, training: Training) -> PlannedStep:
    """The seconds of a step by what they go to, and the bytes that a GPU sends in it, by the estimate.

    None where the GPU is not known.
    """
    if (gpu := of_cluster(config.cluster)) is None:
        return {"step": None, "sent": None}
    does = work(config, training)
    step, sent = step_time(does, gpu), traffic(does, gpu)
    return {
        "step": asdict(step) | {"total": step.total},
        "sent": {kind: asdict(moved) for kind, moved in sent.items()},
    }


def _time(training: Training, needs: Estimate) -> PlannedTime:
    return {
        "tokens_per_second_per_process": needs.speed and needs.speed.tokens_per_second,
        "speed_source": needs.speed and needs.speed.source,
        "hours": needs.hours,
        "process_hours": needs.process_hours,
        "published_hours": hours_at(needs.published, training),
        "published_source": needs.published and needs.published.source,
    }


def _mix(config: Config, training: Training, corpora: Mapping[str, PlannedCorpus]) -> dict[str, Taken]:
    """What a phase takes of each corpus, and how often it goes through its tokens, counted or estimated."""
    blend = next((phase.blend for phase in config.pretrain.phases if phase.name == training.phase), [])
    held_out = {corpus.name for corpus in config.corpora if not corpus.trained}
    trained = [entry for entry in blend if entry.corpus not in held_out]
    total = sum(entry.weight for entry in trained)
    mix: dict[str, Taken] = {}
    for entry in trained:
        tokens, corpus = training.tokens * entry.weight / total, corpora[entry.corpus]
        there = corpus["train_tokens"] or corpus["estimated_tokens"]
        mix[entry.corpus] = {
            "share": entry.weight / total,
            "tokens": tokens,
            "epochs": tokens / there if there else None,
        }
    return mix
