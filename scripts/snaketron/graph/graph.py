"""What the rules ask while Snakemake builds the graph: which files a target needs, what a job gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from snaketron.config import ChatSource, Config, ConfigError, Corpus, Curation
from snaketron.config.names import named_paths
from snaketron.graph.base import BaseGraph
from snaketron.graph.curation import CurationGraph
from snaketron.graph.disk import raw_bytes
from snaketron.graph.evaluation import EvaluationGraph
from snaketron.graph.raw_files import RawFiles
from snaketron.graph.training import TrainingGraph
from snaketron.graph.unknown import find
from snaketron.settings.blends import blend_settings, phase_settings
from snaketron.settings.chats import pack_settings, render_settings
from snaketron.settings.registering import register_settings
from snaketron.settings.text import tokenize_settings, tokenizer_text_settings
from snaketron.settings.tokenizer import template_settings, tokenizer_settings
from snaketron.settings.training import train_settings
from snaketron.sizes.checks import check_trainings
from snaketron.sizes.data_jobs import index_bytes, index_seconds, reading_seconds
from snaketron.sources.lockfile import LockedFile, read_lock, request
from snaketron.sources.models import task_data, tokenizer_model
from snaketron.sources.shards import all_shards

REPORT = "report/report.html"


class Graph:
    """Answers from a checked configuration. Raises `ConfigError` with all raw files that are missing.

    `curation`, `bases`, `training` and `evaluation` answer the rules of their own files.

    Args:
        configfiles: those of the command line, which messages repeat.
        assuming: take one file for the files of a source or a model that nobody listed yet, as a dry-run may;
            `lock.unlisted` says what is missing.
    """

    def __init__(
        self, config: Config, configfiles: Collection[str | Path] = (), *, assuming: bool = False
    ) -> None:
        check_trainings(config)
        self.config = config
        self.corpora: dict[str, Corpus] = {c.name: c for c in config.corpora}
        self.chats: dict[str, ChatSource] = {c.name: c for c in config.chats}
        self.phases = {p.name: p for p in config.pretrain.phases}
        self.lock = read_lock(config.sources_lock, configfiles, assuming=assuming)
        # The shards of each source, and the raw files that a shard is made from, in order.
        self.text, self.conversations, wrong = all_shards(config, self.lock)
        for where, source in config.sources():
            if where in wrong and request(source):
                raise wrong[where]
        if wrong:
            raise ConfigError("\n".join(map(str, wrong.values())))
        # The tokenizer of the hub that is used, and the files that it is fetched as.
        self.tokenizer_model = tokenizer_model(config)
        self.tokenizer_files = self.tokenizer_model.files(self.lock) if self.tokenizer_model else []
        self.curation = CurationGraph(config, self.text)
        self.bases = BaseGraph(config, self.lock)
        self.training = TrainingGraph(config, self.bases)
        self.evaluation = EvaluationGraph(config, self.lock)
        self._raw_files: RawFiles | None = None
        self._workflow: Any = None

    def watch(self, workflow: Any) -> None:
        """Let records decide which files of the user were changed. Only the main process asks that."""
        self._workflow = workflow
        self._raw_files = RawFiles(workflow, Path(self.config.pathvars["data"]))
        self.bases.raw_files = RawFiles(workflow, Path(self.config.pathvars["ckpt"]))

    def keep_records(self) -> None:
        """Keep what the records say of these files, at the end of a run."""
        for raw_files in (self._raw_files, self.bases.raw_files):
            if raw_files:
                raw_files.keep()

    def _seen_by(self, record: str, files: list[str]) -> list[str]:
        return self._raw_files.seen_by(record, files) if self._raw_files else files

    def paths(self) -> list[str]:
        """The files and roots that the user named, raw files included."""
        raw = [*self.text.values(), *self.conversations.values()]
        files = [file for shards in raw for shard in shards.values() for file in shard]
        return [*(path for _, path in named_paths(self.config)), *files]

    # Where data or a checkpoint may be given, one rule makes an output and another one registers it.
    # Constraints on the name of a corpus, a source or a phase say which.

    def given(self, kind: Literal["corpora", "chats", "phases"]) -> str:
        """A regular expression of the names whose results are given; nothing fits it where there are none."""
        if kind == "phases":
            return "|".join(p.name for p in self.phases.values() if p.checkpoint) or "(?!)"
        sources: Iterable[Corpus | ChatSource] = (self.corpora if kind == "corpora" else self.chats).values()
        return "|".join(source.name for source in sources if source.registered) or "(?!)"

    def others(self, kind: Literal["corpora", "chats", "phases"]) -> str:
        """A regular expression of all other names."""
        return rf"(?!(?:{self.given(kind)})(?:/|$))[a-z0-9_]+"

    # Input functions get the wildcards of the job.

    def raw_text(self, wildcards: Any) -> list[str]:
        """The raw files of a shard; of one that was tokenized elsewhere, its .bin and its .idx."""
        made = "curation/filtered" if self._corpus(wildcards).curation else "tokens"
        record = f"{made}/{wildcards.corpus}/{wildcards.shard}.json"
        files = find(f"shard of corpus {wildcards.corpus}", wildcards.shard, self.text[wildcards.corpus])
        return self._seen_by(record, files)

    def text_to_tokenize(self, wildcards: Any) -> list[str]:
        """The raw files of a shard, or what curation left of them."""
        if self._corpus(wildcards).curation:
            return [f"<data>/curated/{wildcards.corpus}/{wildcards.shard}.parquet"]
        return self.raw_text(wildcards)

    def raw_chats(self, wildcards: Any) -> list[str]:
        """The raw files of a shard of conversations, or the packs of one that was packed elsewhere."""
        shards = find("source of conversations", wildcards.source, self.conversations)
        files = find(f"shard of source {wildcards.source}", wildcards.shard, shards)
        made = "sft" if self.chats[wildcards.source].registered else "chat"
        return self._seen_by(f"{made}/{wildcards.source}/{wildcards.shard}.json", files)

    def _corpus(self, wildcards: Any) -> Corpus:
        return find("corpus", wildcards.corpus, self.corpora)

    def seconds(self, job: Any) -> float:
        """How long a job will read its raw files, roughly; 0 where it reads none, or only their beginning."""
        corpus, chats = (job.wildcards.get(key, "") for key in ("corpus", "source"))
        source = self.corpora.get(corpus) or self.chats.get(chats)
        if source is None or source.limited:
            return 0.0
        shards = self.text[corpus] if corpus else self.conversations[chats]
        files = shards.get(job.wildcards.get("shard", ""), [])
        return reading_seconds(
            job.rule.name, {file: raw_bytes(source.name, file, self.lock) or 0 for file in files}
        )

    def rendered_chats(self, wildcards: Any) -> list[str]:
        """The rendered shards that are packed together: one, or all of a source."""
        across = self.config.sft_data.pack_across_shards
        known = find("source of conversations", wildcards.source, self.conversations)
        find(f"packed shard of source {wildcards.source}", wildcards.shard, {"all": ""} if across else known)
        shards = list(known) if across else [wildcards.shard]
        return [f"<data>/chat/{wildcards.source}/{shard}.parquet" for shard in shards]

    def tokenizer_text(self, _wildcards: Any) -> list[str]:
        """Files that a tokenizer is trained on; none when it is taken from elsewhere."""
        return [] if self.config.tokenizer.path else self.config.tokenizer.text

    def hub_tokenizer(self, _wildcards: Any) -> list[str]:
        """The downloaded files of a tokenizer of the hub; none for another."""
        self._watch_tokenizer("build_tokenizer", "tokenizer/record.json")
        return self.tokenizer_files

    def _watch_tokenizer(self, rule: str, record: str) -> None:
        """A tokenizer in a directory of the user is no input of a rule; its content decides."""
        if self._raw_files and self.config.tokenizer.path and not self.tokenizer_model:
            self._raw_files.watch_directory(rule, record, Path(self.config.tokenizer.path))

    def chat_template(self, _wildcards: Any) -> list[str]:
        """The file of the chat template, or those of the hub tokenizer that it comes with."""
        if template := self.config.tokenizer.chat_template:
            return self._seen_by("tokenizer/chat_template.json", [template])
        self._watch_tokenizer("install_chat_template", "tokenizer/chat_template.json")
        return self.tokenizer_files

    def source_template(self, wildcards: Any) -> str:
        """The template that renders a source: its own, or that of the tokenizer."""
        if template := self.chats[wildcards.source].chat_template:
            return self._seen_by(f"chat/{wildcards.source}/{wildcards.shard}.json", [template])[0]
        return "<data>/tokenizer/chat_template.jinja"

    def evaluation_texts(self, _wildcards: Any) -> list[str]:
        """The texts that no corpus may share an n-gram with."""
        return self._seen_by("curation/evaluation/index.json", self.config.curation.evaluation)

    def language_models(self, wildcards: Any) -> list[str]:
        """The model files that the filters of a corpus read."""
        filters = (self.corpora[wildcards.corpus].curation or Curation()).filters
        models = [str(entry.options["model"]) for entry in filters if entry.name == "language"]
        return self._seen_by(f"curation/filtered/{wildcards.corpus}/{wildcards.shard}.json", models)

    def before_report(self, _wildcards: Any) -> list[str]:
        """The files that were asked for beside the report, which is made each time that it is asked for."""
        if not self._workflow:
            return []
        self._workflow.dag.forcerules.add(self._workflow.get_rule("report"))
        targets = self._workflow.dag_settings.targets
        return [t for t in targets if t != REPORT and not self._workflow.is_rule(t)]

    def phase_shards(self, pattern: str, *, made_here: bool = False) -> Callable[[Any], list[str]]:
        """The files of a phase, one or more a shard: `pattern` with {corpus} and {shard} filled in.

        With `made_here`, of those corpora alone that are tokenized here: the others have only records.
        """
        return lambda wildcards: [
            pattern.format(corpus=entry.corpus, shard=shard)
            for entry in find("phase of pretraining", wildcards.phase, self.phases).blend
            for shard in self.text[entry.corpus]
            if not (made_here and self.corpora[entry.corpus].registered)
        ]

    def sft_shards(self, pattern: str) -> list[str]:
        """The files of the SFT blend: `pattern` with {source} and {shard} filled in."""
        return [
            pattern.format(source=entry.source, shard=shard)
            for entry in self.config.sft.blend
            for shard in self.packed_shards(entry.source)
        ]

    def packed_shards(self, source: str) -> list[str]:
        """Names of the packed shards of a source: those of its shards, or one for all of them."""
        across = self.config.sft_data.pack_across_shards and not self.chats[source].registered
        return ["all"] if across else list(self.conversations[source])

    # Params: a change runs the job again.

    def tokenizer_settings(self, _wildcards: Any) -> str:
        return tokenizer_settings(self.config, self.tokenizer_directory()).model_dump_json()

    def tokenizer_reading(self, _wildcards: Any) -> str:
        """What becomes of bad rows in a tokenizer's text."""
        return tokenizer_text_settings(self.config).model_dump_json()

    def template_settings(self, _wildcards: Any) -> str:
        return template_settings(self.config, self.tokenizer_directory()).model_dump_json()

    def tokenizer_directory(self) -> str:
        """The directory of a tokenizer that is not trained: the configured one, or that of its downloads."""
        model = self.tokenizer_model
        return model.directory(self.config) if model else self.config.tokenizer.path or ""

    def tokenize_settings(self, wildcards: Any) -> str:
        return tokenize_settings(self.config, self.corpora[wildcards.corpus]).model_dump_json()

    def register_settings(self, wildcards: Any) -> str:
        is_text = hasattr(wildcards, "corpus")
        source = self.corpora[wildcards.corpus] if is_text else self.chats[wildcards.source]
        return register_settings(self.config, source, wildcards.shard).model_dump_json()

    def pack_settings(self) -> str:
        return pack_settings(self.config).model_dump_json()

    def render_settings(self, wildcards: Any) -> str:
        return render_settings(self.config, self.chats[wildcards.source]).model_dump_json()

    def phase_settings(self, wildcards: Any) -> str:
        return phase_settings(self.config, wildcards.phase).model_dump_json()

    def index_settings(self, wildcards: Any) -> str:
        return train_settings(self.config, f"pretrain/{wildcards.phase}").index.model_dump_json()

    def blend_settings(self) -> str:
        return blend_settings(self.config).model_dump_json()

    def download_size(self, wildcards: Any) -> int:
        """Bytes of a file to download."""
        return self._locked_file(wildcards).size

    def download_sha256(self, wildcards: Any) -> str:
        return self._locked_file(wildcards).sha256

    # Resources: a change runs nothing again.

    def index_resources(self) -> dict[str, Callable[..., int]]:
        """Memory and time of the jobs that index phases; none where the profile's for data jobs will do."""
        if all(self._index_mb(name) < 3000 and self._index_minutes(name) < 50 for name in self.phases):
            return {}

        def mem_mb(wildcards: Any, attempt: int) -> int:
            return max(4000 * attempt, self._index_mb(wildcards.phase))

        def runtime(wildcards: Any) -> int:
            return max(60, self._index_minutes(wildcards.phase))

        return {"mem_mb": mem_mb, "runtime": runtime}

    def _index_mb(self, phase: str) -> int:
        return math.ceil(index_bytes(self._index_size(phase)[0]) / 1e6)

    def _index_minutes(self, phase: str) -> int:
        """With half as much again, and some for reading."""
        return math.ceil(10 + 1.5 * index_seconds(*self._index_size(phase)) / 60)

    def _index_size(self, phase: str) -> tuple[int, int, int]:
        """Samples of a phase, the tokens of each, and the shards that it blends."""
        training = self.config.training(f"pretrain/{phase}")
        shards = sum(len(self.text[entry.corpus]) for entry in self.phases[phase].blend)
        return training.train_iters * training.global_batch_size, training.seq_length, shards

    def download_address(self, wildcards: Any) -> str:
        """Where a file to download lies. A new revision may move a file that stays the same."""
        return self._locked_file(wildcards).address

    def download_name(self, wildcards: Any) -> str:
        """What the record calls a file to download: by its source, model or data set."""
        names = ("source", "owner", "model", "dataset", "file")
        return "/".join(getattr(wildcards, name) for name in names if hasattr(wildcards, name))

    def download_mb(self, wildcards: Any) -> int:
        """Size of a file to download, for limits of a profile."""
        return math.ceil(self._locked_file(wildcards).size / 1e6)

    def _locked_file(self, wildcards: Any) -> LockedFile:
        """A file of a source, of a model of the hub, or of the data of a task; the wildcards say which."""
        if source := getattr(wildcards, "source", None):
            return self.lock.file(source, wildcards.file)
        if model := getattr(wildcards, "model", None):
            return self.lock.file(f"{wildcards.owner}/{model}", wildcards.file)
        place = f"datasets/{wildcards.owner}/{wildcards.dataset}@{wildcards.commit}"
        known = {data.place(self.lock): data.name for data in task_data(self.config).values()}
        return self.lock.file(find("data set of a task", place, known), wildcards.file)
