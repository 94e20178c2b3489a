"""The evaluation of a checkpoint as a job: parts that are kept, in as many processes as the layout has.

It works in a version directory of its own, `<eval>/versions/<stage>-<key>/`, under the supervisor of the
trainings. Each part is a file there, so an evaluation that was killed goes on with the part it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.files import read_json, sha256, write_json
from snaketron.jobs.heartbeat import Heartbeat
from snaketron.jobs.launch import is_writer, rank
from snaketron.jobs.version import Version, version_key
from snaketron.lineage.record import Entry, making, of_user
from snaketron.log import logger
from snaketron.settings.evaluation import EvalSettings
from snaketron.settings.training import RunSettings

if TYPE_CHECKING:  # imports megatron-core (5 s), which the supervisor does not need
    from snaketron.model.build import BuiltModel

type Part = Callable[[BuiltModel], dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, on what, and where the result goes.

    text: blends of pretraining, whose corpora are evaluated on their test splits.
    chats: the blend of SFT, or None.
    """

    settings: EvalSettings
    run: RunSettings
    checkpoint: Path
    text: list[Path]
    chats: Path | None
    output: Path

    @cached_property
    def inputs(self) -> list[Entry]:
        blends = [*self.text, *([self.chats] if self.chats else [])]
        return [
            Entry("checkpoint", str(self.checkpoint), version=Version(self.checkpoint).identity),
            *(Entry("blend", str(path), sha256=sha256(path)) for path in blends),
            *(of_user(Path(path)).renamed("task") for path in self.settings.task_files),
        ]

    @cached_property
    def key(self) -> str:
        return version_key(self.settings.model_dump(), [entry.identity for entry in self.inputs])

    @cached_property
    def version(self) -> Version:
        """Where it works."""
        return Version.of(self.output, self.settings.stage, self.key)

    def parts_done(self) -> int:
        return len([*self.version.directory.glob("*.part.json")])

    def publish(self) -> None:
        """Put the finished result where the rule wants it."""
        write_json(self.output, read_json(self.version.directory / "results.json"))
        logger.info("%s: evaluated, in %s", self.settings.stage, self.output)


def evaluate(job: Evaluation) -> int:
    """Compute the parts that are not there yet, in every process of the layout; the exit status."""
    from snaketron.inference.opening import open_checkpoint
    from snaketron.model.distributed import distributed

    smaller = f"a lower eval.batch_size ({job.settings.batch_size}), or larger sizes in eval.parallel"
    with distributed(0, job.run, smaller=smaller):
        built = open_checkpoint(job.checkpoint, job.run)
        made = dict(parts(job))
        heartbeat = Heartbeat(job.version.heartbeat, len(made), writer=is_writer())
        built = replace(built, alive=heartbeat.alive)
        for number, (name, part) in enumerate(made.items()):
            heartbeat.beat(number)
            file = job.version.directory / f"{name.replace('/', '_')}.part.json"
            if file.exists():
                continue
            if is_writer():
                logger.info("%s: evaluating %s (%d of %d)", job.settings.stage, name, number + 1, len(made))
            found = part(built)
            if rank() == 0:
                write_json(file, found)
        if rank() == 0:
            _finish(job, list(made))
    return 0


def parts(job: Evaluation) -> Iterator[tuple[str, Part]]:
    """The parts by name: text/<corpus>, chats/<source>, answers/<source>, tasks/<name>."""
    from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
    from snaketron.inference import evaluate as compute

    settings, version = job.settings, Version(job.checkpoint)
    tokenizer, info = load_tokenizer(version.tokenizer), tokenizer_info(version.tokenizer)
    sizes, batch = compute.Sizes(tokenizer, info.eos_id), settings.batch_size
    if settings.text_tokens:
        text = partial(
            compute.text_losses, sizes=sizes, eos_id=info.eos_id, most=settings.text_tokens, batch_size=batch
        )
        for corpus, shards in compute.corpora(job.text).items():
            yield f"text/{corpus}", partial(text, shards=shards)
    chats = partial(compute.chat_losses, sizes=sizes, most_packs=settings.chat_packs, batch_size=batch)
    answers = partial(
        compute.exact_answers,
        tokenizer=tokenizer,
        most=settings.answers,
        max_tokens=settings.answer_tokens,
        batch_size=batch,
    )
    for source in compute.held_out_sources(job.chats) if job.chats else []:
        if settings.chat_packs:
            yield f"chats/{source.source}", partial(chats, files=source.files)
        if settings.answers:
            yield f"answers/{source.source}", partial(answers, files=source.files)
    if settings.tasks:
        from snaketron.data.chats.environment import special_tokens
        from snaketron.inference.harness import CheckpointLM, run_task
        from snaketron.inference.prompting import ends_of_answers, template_of

        ends, template = ends_of_answers(version), template_of(version)
        begin = special_tokens(version.tokenizer).get("bos_token")
        for task in settings.tasks:

            def of_task(built: BuiltModel, task: Any = task) -> dict[str, Any]:
                return run_task(
                    CheckpointLM(built, tokenizer, ends, template, batch, begin),
                    task,
                    directories=[Path(path) for path in settings.task_directories],
                    limit=settings.task_limit,
                    apply_chat_template=settings.apply_chat_template,
                )

            yield f"tasks/{task.name}", of_task


def _finish(job: Evaluation, names: list[str]) -> None:
    """Put the parts together, and write the record, which says that the evaluation is complete."""
    results: dict[str, Any] = {"stage": job.settings.stage, "checkpoint": job.inputs[0].version}
    for name in names:
        kind, _, of = name.partition("/")
        found = read_json(job.version.directory / f"{name.replace('/', '_')}.part.json")
        results.setdefault(kind, {}).update(found if kind == "tasks" else {of: found})
    outputs = {"results": job.version.directory / "results.json"}
    with making("evaluation", job.settings.stage, outputs=outputs, record=job.version.record) as made:
        write_json(made.aside["results"], results)
        made.inputs = {f"{entry.name}_{i}": entry for i, entry in enumerate(job.inputs)}
        made.settings, made.key = job.settings.model_dump(), job.key
