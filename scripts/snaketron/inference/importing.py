"""Import a checkpoint that was made elsewhere, to begin a training with: verified, recorded and published."""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path
from typing import Any

from snaketron.config import Model, Optimizer
from snaketron.data.tokenizer import Info, known_hashes, load_tokenizer, tokenizer_info
from snaketron.files import owned, sha256, writing_directory
from snaketron.huggingface.load import Weights, megatron_weights, published_weights
from snaketron.huggingface.save import listed
from snaketron.huggingface.torch_dist import write
from snaketron.jobs.version import Description, Version, version_key
from snaketron.lineage.record import Entry, of_user
from snaketron.log import NO_SPACE, UserError, logger
from snaketron.settings.schedule import Schedule
from snaketron.settings.training import TrainSettings

from tokenizers import Tokenizer

# Counts of a record that say which sequences a published config.json speaks of, and where answers end.
STATED_LENGTH, ENDS = "stated_length", "ends_of_answers"


def import_base(
    source: Path, output: Path, *, stage: str, model: Model, tokenizer: Path, seq_length: int
) -> None:
    """Write a checkpoint that trainings start from, in a version of its own, and link `output` to it.

    Args:
        source: directory of a published checkpoint, or of one of Megatron in the torch_dist format.
        stage: its name below <ckpt>, base/....
        model: what it must be a checkpoint of.
        tokenizer: directory of the tokenizer of the trainings.
        seq_length: tokens that answers of it may have.

    Raises:
        UserError: it is of another model, incomplete or damaged, or there is no room; nothing is published.
    """
    started = time.monotonic()
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; correct the path of the checkpoint")
    info = tokenizer_info(tokenizer)
    check_tokenizer(source, tokenizer)
    weights = _weights(source, model, info)
    if weights.unread:
        logger.warning("%s: %s", source, weights.unread)
    logger.info("%s: hashing %d files", source, len(weights.files))
    inputs = [of_user(path).renamed("weights") for path in weights.files]
    identities = [entry.sha256 for entry in inputs]
    key = version_key({"stage": stage, "model": model.model_dump()}, [*identities, info.sha256])
    version = Version.of(output, stage, key)
    version.directory.mkdir(parents=True, exist_ok=True)
    version.ask(output)
    with owned(version.lock):
        if not version.is_finished:
            settings = _settings(stage, model, weights, seq_length)
            _write(version, weights, settings, tokenizer, info, inputs, started)
    version.publish(output)
    logger.info("%s: %s is %s", stage, output, version.directory)


def _weights(source: Path, model: Model, info: Info) -> Weights:
    if (source / "config.json").exists():
        return published_weights(source, model, info.vocab_size)
    if (tensors := Version(source).tensors) is None:
        raise UserError(
            f"{source}: neither a published checkpoint (config.json) nor one of Megatron "
            "(latest_checkpointed_iteration.txt, or the .metadata of one iteration)"
        )
    return megatron_weights(tensors, model, info.vocab_size)


def _settings(stage: str, model: Model, weights: Weights, seq_length: int) -> TrainSettings:
    """Settings as a training's checkpoint has them, so that it is opened and exported like one."""
    own: dict[str, Any] = {"precision": weights.precision}
    if weights.stated_deviation:
        own["init_method_std"] = weights.stated_deviation
    return TrainSettings(
        stage=stage,
        seed=0,
        model=Model.model_validate(model.model_dump() | own),
        optimizer=Optimizer(),
        seq_length=seq_length,
        global_batch_size=1,
        train_iters=0,
        schedule=Schedule(style="cosine", start=0, warmup=0, end=0, decay=0, increment=1),
    )


def _write(
    version: Version,
    weights: Weights,
    settings: TrainSettings,
    tokenizer: Path,
    info: Info,
    inputs: list[Entry],
    started: float,
) -> None:
    """Write the tensors, then what says that they are complete."""
    target = version.iteration_directory(0)
    begun = time.monotonic()
    try:
        with writing_directory(target) as aside:
            write(aside, weights.chunks, {"iteration": 0})
            if weights.not_finite:
                title = "the checkpoint holds numbers that are not finite:"
                raise UserError(listed(title, weights.not_finite))
    except RuntimeError as error:  # torch's writer keeps the reason of the system as its cause, or not at all
        free = shutil.disk_usage(version.directory).free
        raise UserError(
            f"{target}: cannot be written ({error}); {free / 1e9:.1f} GB are free there; free some "
            f"({', '.join(NO_SPACE.values())}?) and run the same command again"
        ) from error
    size = sum(path.stat().st_size for path in target.iterdir())
    seconds = time.monotonic() - begun
    version.complete(
        Description(settings.model_dump(), inputs, info.sha256),
        tokenizer,
        0,
        {"bytes": size, "bytes_per_second": round(size / max(seconds, 1e-9))}
        | ({STATED_LENGTH: weights.stated_length} if weights.stated_length else {})
        | ({ENDS: list(weights.ends)} if weights.ends else {}),
        inputs={"weights": inputs},
        started=started,
    )
    logger.info("%s: %.3f GB, %.0f MB/s", target, size / 1e9, size / 1e6 / max(seconds, 1e-9))


def check_tokenizer(source: Path, tokenizer: Path) -> None:
    """`UserError` unless the tokenizer of the trainings gives the ids that the checkpoint was trained with.

    Each token must have its id, and a text of all tokens be divided alike: by other merges, or another rule
    for digits and spaces, a model would read texts otherwise than it learned to.
    """
    if not (source / "tokenizer.json").exists() and (source / "tokenizer/tokenizer.json").exists():
        source = source / "tokenizer"  # a checkpoint of another working directory of this workflow
    path = source / "tokenizer.json"
    if not path.exists():
        logger.warning("%s: no tokenizer.json there, so the vocabulary is compared by its size alone", source)
        return
    if sha256(path) in known_hashes(tokenizer):
        return
    if problem := _difference(load_tokenizer(source), load_tokenizer(tokenizer)):
        raise UserError(
            f"{path} is another tokenizer than {tokenizer}: {problem}; set tokenizer.path to {source}"
        )


def _difference(there: Tokenizer, here: Tokenizer) -> str:
    """How the ids differ that two tokenizers give; empty where they do not."""
    ids, own = there.get_vocab(), here.get_vocab()
    if differ := sorted(token for token in ids if own.get(token) != ids[token]):
        shown = ", ".join(f"{token!r} {ids[token]} and {own.get(token, 'none')}" for token in differ[:3])
        return f"{len(differ)} of {len(ids)} tokens have another id ({shown})"
    text = there.decode(sorted(ids.values()))
    pairs = itertools.zip_longest(*(t.encode(text, add_special_tokens=False).tokens for t in (there, here)))
    found = next((pair for pair in pairs if pair[0] != pair[1]), None)
    return f"texts are divided into other tokens ({found[0]!r} and {found[1]!r})" if found else ""
