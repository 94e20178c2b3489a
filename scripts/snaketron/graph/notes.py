"""What a user is told beside the plan: what is the sample's, what is replaced, what a target is called."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from snaketron.config import ChatSource, Config, Corpus
from snaketron.config.base import closest
from snaketron.graph.checks import made_tokenizer
from snaketron.graph.configfiles import mixed
from snaketron.graph.graph import Graph
from snaketron.graph.lines import without_notes
from snaketron.huggingface.config import token_ids
from snaketron.log import UserError
from snaketron.sources.local import SAMPLE, unread
from snaketron.sources.shards import to_download
from snaketron.wording import counted, some

COSTLY = ("build_tokenizer", "tokenize_shard", "filter_shard", "curate_shard")  # rules


def of_configuration(graph: Graph, configfiles: Sequence[str | Path]) -> Iterator[str]:
    """What the configuration leaves out, assumes or mixes, a line each, before the first job."""
    config = graph.config
    yield from unread(config)
    if assumed := graph.lock.assumed():
        yield f"One file of each is assumed: {assumed}"
    downloads = to_download(config, graph.lock)
    yield from filter(None, [downloads, *graph.bases.unread(), mixed(configfiles), from_sample(config)])
    yield from filter(None, [unblended(config), other_vocabulary(config, graph.tokenizer_directory())])
    yield from filter(None, [unused_gpu(config)])
    yield from unmeasured(config)
    yield from read_again(config)


def from_sample(config: Config) -> str | None:
    """What the trainings take from the sample beside sources of the user's; None where either is nothing."""
    used = _blended(config)
    text = [corpus for corpus in config.corpora if corpus.name in used["corpora"]]
    chats = [source for source in config.chats if source.name in used["chats"]]
    if all(map(_of_sample, text)) and all(map(_of_sample, chats)):
        return None
    left = [
        f"{key} {', '.join(names)}"
        for key, found in (("corpora", text), ("chats", chats))
        if (names := [source.name for source in found if _of_sample(source)])
    ]
    tokenizer = config.tokenizer
    if not tokenizer.path and any(SAMPLE.fullmatch(path) for path in tokenizer.text):
        left.append("the text of the tokenizer (tokenizer.text)")
    return f"Still from the sample beside your own sources: {'; '.join(left)}" if left else None


def other_vocabulary(config: Config, taken_from: str) -> str | None:
    """That the tokenizer has another size than is configured; None where it has not, or nobody knows yet.

    Args:
        config: the configuration.
        taken_from: the directory of a tokenizer that is not trained. What was made of another one, or
            trained, is replaced by a run, so its size says nothing.
    """
    stated, made = config.tokenizer.vocab_size, made_tokenizer(config)
    if not taken_from:
        return None
    where, there = f"{config.pathvars['data']}/tokenizer", None
    if made is not None and made.settings.get("path") == taken_from:
        there = made.counts.get("vocab_size")
    else:
        path = Path(taken_from) / "tokenizer.json"
        # It may not be downloaded yet; what is wrong with it, its job says.
        with contextlib.suppress(UserError, OSError, ValueError):
            where, there = taken_from, max(token_ids(path).values()) + 1
    if there in (stated, None):
        return None
    return (
        f"tokenizer.vocab_size is {stated}, and the tokenizer in {where} has {there} tokens: "
        f"memory, times and pipeline stages are worked out for {stated}; set it to {there}"
    )


def unused_gpu(config: Config) -> str | None:
    """That the GPU which is named has no effect; None where it has one, or none is named."""
    gpu = config.cluster.gpu
    if gpu is None or config.cluster.gpus_per_node:
        return None
    return (
        f"cluster.gpu is {gpu} and cluster.gpus_per_node 0, so trainings are planned for CPUs and run there; "
        "say how many GPUs a node has"
    )


def unmeasured(config: Config) -> list[str]:
    """Sources in a blend whose loss nobody will see, because hardly a document is held out for validation."""
    lines, few = [], dict[str, list[str]]()  # few: by what is said of them, the sources
    used = _blended(config)
    splits: dict[str, set[str | None]] = {every: set() for every in used}
    for at, source in config.sources():
        every = at.partition("[")[0]
        if source.name in used[every]:
            splits[every].add(source.split)
    for at, source in config.sources():
        every = at.partition("[")[0]
        if source.name not in used[every] or source.split == "valid":
            continue
        if splits[every] <= {"train", "test"}:
            said = "no source in a blend is of split valid or null, so no validation loss is measured"
            lines.append(f"{every}: {said}")
        if source.split:
            continue
        section, fraction = source.section, config.data_of(source).valid_fraction
        if not fraction:
            if "valid" not in splits[every]:
                lines.append(f"{section}.valid_fraction is 0, so no validation loss is measured on {every}")
            continue
        if source.registered and not source.registered.valid:
            said = f"{source.made}.valid names nothing, so it has no validation loss"
            lines.append(f"{at} ({source.name}): {said}")
        if source.max_documents and (expected := source.max_documents * fraction) < 1:
            said = (
                f"of max_documents {source.max_documents} about {expected:.2g} are held out "
                f"({section}.valid_fraction {fraction:g}), so there may be no validation loss"
            )
            few.setdefault(f"{every}: {said}", []).append(source.name)
    lines += [f"{said} of {some(names, 3)}" for said, names in few.items()]
    return list(dict.fromkeys(lines))


def unblended(config: Config) -> str | None:
    """Sources that the user lists and no blend names; None without any."""
    used = _blended(config)
    left = [
        f"{key} {', '.join(names)}"
        for key, sources in (("corpora", config.corpora), ("chats", config.chats))
        if (names := [s.name for s in sources if s.name not in used[key] and not _of_sample(s)])
    ]
    return f"In no blend, so nothing is trained on them: {'; '.join(left)}" if left else None


def read_again(config: Config) -> list[str]:
    """Phases that read the text again with which an earlier one began, though there may be more of it.

    Samples of another length are shuffled otherwise, because there are more of them or fewer.
    """
    sample = {corpus.name for corpus in config.corpora if _of_sample(corpus)}
    held_out = {corpus.name for corpus in config.corpora if not corpus.trained}
    before: dict[tuple[int, int], dict[str, str]] = {}  # by seed and length, the first that reads a corpus
    lines = []
    for i, phase in enumerate(config.pretrain.phases):
        seed = config.seed if phase.seed is None else phase.seed
        seen = before.setdefault((seed, phase.seq_length or config.pretrain.seq_length), {})
        corpora = [entry.corpus for entry in phase.blend if entry.corpus not in held_out]
        shared = {name: seen[name] for name in corpora if name in seen and name not in sample}
        if shared and phase.checkpoint is None:
            said = some([f"{name} ({first})" for name, first in shared.items()], 3)
            lines.append(
                f"pretrain.phases[{i}] ({phase.name}) reads again from the beginning, as phases before it "
                f"did: {said}. Seed and length are the same; give it a `seed` of its own for other text"
            )
        for name in corpora:
            seen.setdefault(name, phase.name)
    return lines


def _blended(config: Config) -> dict[str, set[str]]:
    """The names of the sources that some blend names, by the section that lists them."""
    return {
        "corpora": {entry.corpus for phase in config.pretrain.phases for entry in phase.blend},
        "chats": {entry.source for entry in config.sft.blend},
    }


def _of_sample(source: Corpus | ChatSource) -> bool:
    return any(SAMPLE.fullmatch(path) for path in source.paths)


def moved_targets(config: Config, targets: Iterable[str]) -> list[str]:
    """What targets are called in this configuration, for those named as they are where no root is moved."""
    roots: dict[str, str] = {str(name): root for name, root in config.pathvars.items()}
    lines = []
    for target in targets:
        name, _, rest = os.path.normpath(target).partition("/")
        root = roots.get(name, name)
        sample = name == "data" and rest.startswith("sample/")  # not below a root that is moved
        if rest and name and not sample and root != name:
            lines.append(f"{target}: pathvars.{name} is {root}, so ask for {root}/{rest}")
    return lines


def meant(
    config: Config, targets: Iterable[str], rules: Iterable[str] = (), bases: Iterable[str] = ()
) -> list[str]:
    """What a target that no rule makes may mean: a result or a rule of nearly the same name."""
    ckpt, hf, measured = (config.pathvars[name] for name in ("ckpt", "hf", "eval"))
    merged = [f"merged/{phase.name}" for phase in config.pretrain.phases]
    stages = [*(training.name for training in config.trainings()), "lora_merged", *merged]
    stages += [f"base/{name}" for name in bases]
    known = [
        path for stage in stages for path in (f"{ckpt}/{stage}", f"{hf}/{stage}", f"{measured}/{stage}.json")
    ]
    lines = []
    for target in targets:
        near = closest(os.path.normpath(target), [*known, *rules], cutoff=0.75)
        if near and near != os.path.normpath(target):
            lines.append(f"{target}: did you mean {near}?")
    return lines


def explain(workflow: Any, graph: Graph) -> None:
    """Print at the end what targets are called, in a dry-run what would be replaced, and what nobody watched.

    Snakemake says in a dry-run of which finished jobs it has no notes, and not where a run has nothing to do.
    The targets are known only after the Snakefile was read, and a wrong one is an error before any job.
    """
    settings, dag = workflow.dag_settings, getattr(workflow, "dag", None)
    lines = moved_targets(graph.config, sorted(settings.targets)) if settings else []
    if dag is not None and not lines:
        made = {file for job in dag.targetjobs for file in job.output}
        rules = (rule.name for rule in workflow.rules)
        lines = meant(graph.config, sorted(set(dag.targetfiles) - made), rules, graph.bases.bases)
    if workflow.dryrun and dag and (warning := replaced_by(workflow)):
        lines.append(warning)
    if dag is not None and not workflow.dryrun and not len(dag):
        unknown = [job.rule.name for job in dag.jobs if dag.reason(job).no_metadata]
        lines += [without_notes(len(unknown), " ".join(sorted(set(unknown))))] if unknown else []
    for line in lines:
        print(line, file=sys.stderr)


def replaced_by(workflow: Any) -> str | None:
    """`replaced` of the jobs that a workflow will run, or would."""
    return replaced(workflow.dag.needrun_jobs(exclude_finished=False), workflow.dag.reason)


def replaced(jobs: Iterable[Any], reason: Callable[[Any], Any]) -> str | None:
    """A warning about a tokenizer or tokens that other settings made and a run makes anew; None without any.

    Args:
        jobs: those that would run.
        reason: of a job, why it would.
    """
    found = Counter(
        job.rule.name
        for job in jobs
        if job.rule.name in COSTLY
        and not reason(job).missing_output
        # A shard that gets a further raw file is no other configuration; another text of the tokenizer is.
        and (reason(job).params_changed or (reason(job).input_changed and job.rule.name == COSTLY[0]))
    )
    if not found:
        return None
    return (
        f"Made here with other settings, and replaced by this run: {counted(found)}, and what is made from "
        "them. To keep the results of another configuration, give this one directories of its own in pathvars"
    )
