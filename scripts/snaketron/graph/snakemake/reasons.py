"""Why a job runs again when its parameters have changed: keys of the configuration, as they stand there.

Snakemake's reason is all parameters of before and of now. The settings of a training are 1,200 characters, of
which one number may differ.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from snaketron.config import ChatSource, Config, Corpus, Section, Training
from snaketron.settings.defaults import value_of
from snaketron.wording import shortened

ABSENT = "nothing"
LONGEST = 60  # characters of a value
CHECKS = {"max_dropped_fraction"}  # keys that no result depends on; what is finished has passed them

type Flat = dict[str, Any]  # values by their path, such as optimizer.learning_rate


def tell_changes(config: Config) -> None:
    """Have Snakemake give these reasons, in this process; a key that only checks is none."""
    from snakemake.persistence import NO_PARAMS_CHANGE, ParamsChange, PersistenceBase

    original = PersistenceBase.params_changed

    class Told(ParamsChange):
        def __init__(self, change: ParamsChange, words: str) -> None:
            super().__init__(change.only_old, change.only_new, change.files)
            self.words = words

        def __str__(self) -> str:
            return self.words

    def params_changed(persistence: Any, job: Any, file: Any = None) -> Any:
        change = original(persistence, job, file=file)
        if not change:
            return NO_PARAMS_CHANGE  # Snakemake's own names a file all the same, so --list-changes lists it
        names = {repr(value): name for name, value in job.params.items()}
        lines = changes(config, job.rule.name, job.wildcards, change.only_old, change.only_new, names)
        if lines and all(map(is_check, lines)):
            return NO_PARAMS_CHANGE
        return Told(change, ", ".join(lines)) if lines else change

    PersistenceBase.params_changed = params_changed


def is_check(line: str) -> bool:
    """Whether a line of `changes` is about a key that stops a job, and has no part in what the job makes."""
    return line.partition(": ")[0].rpartition(".")[2] in CHECKS


def changes(
    config: Config,
    rule: str,
    wildcards: Mapping[str, str],
    before: Iterable[str],
    now: Iterable[str],
    names: Mapping[str, str],
) -> list[str]:
    """What differs between the parameters of a job then and now, as `sft.train_iters: 30 -> 60`.

    Args:
        before: parameters that only the last run had, as Snakemake records them: Python literals.
        now: those that only this run has.
        names: what the parameters of now are called in the rule.
    """
    lines = []
    old = [_flat(_value(text)) for text in sorted(before)]
    for text in sorted(now):
        new = _flat(_value(text))
        # Parameters are recorded without names: the one of before is that with the most paths in common.
        same = max(old, key=lambda flat: len(flat.keys() & new.keys()), default={})
        if same in old:
            old.remove(same)
        values = {
            path: [value_of(flat, path, rule, ABSENT) for flat in (same, new)] for path in (*new, *same)
        }
        differ = [path for path, (was, is_now) in values.items() if was != is_now]
        # Of keys where none was, or of the last ones that went, each is told and not that nothing is left.
        differ = [path for path in differ if not any(other.startswith(f"{path}.") for other in differ)]
        for path in _told(differ, new):
            place = _place(config, rule, wildcards, path) or names.get(text, rule)
            lines.append(f"{place}: {' -> '.join(map(_short, values[path]))}")
    return lines


def _value(text: str) -> Any:
    """The parameter of which Snakemake has recorded `text`, its `repr`."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):  # of a set, say
        return text


def _flat(value: Any) -> Flat:
    """The values of a parameter by their path; a text of JSON is taken apart."""
    if isinstance(value, str) and value.startswith('{"'):
        return _flat(json.loads(value))
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        value = {f"[{place}]": one for place, one in enumerate(value)}  # filters[0].options
    if isinstance(value, Mapping) and value:
        return {
            ".".join(filter(None, (str(key), path))).replace(".[", "["): leaf
            for key, inner in value.items()
            for path, leaf in _flat(inner).items()
        }
    return {"": value}


def _told(paths: list[str], now: Flat) -> Iterator[str]:
    """The paths without those that follow from others."""
    told = set(paths)
    cosine = now.get("schedule.style") == "cosine"
    for path in paths:
        follows = {
            "schedule.end": "train_iters" in told or not cosine,
            "schedule.start": True,
            "schedule.style": True,
            "schedule.increment": bool(told & {"global_batch_size", "seq_length"}),
            "valid_fraction": "split" in told,
            "test_fraction": "split" in told,
        }
        # Where another phase has changed, the span of this one is all that is left.
        if not follows.get(path) or told <= {"schedule.end", "schedule.start"}:
            yield path


def _place(config: Config, rule: str, wildcards: Mapping[str, str], path: str) -> str | None:
    """Where the configuration has the value at `path` of a parameter of a job; None where it has no path."""
    first, _, rest = path.partition(".")
    if not path:
        return None
    phase = wildcards.get("phase", "")
    for training in config.trainings():
        if (training.section, training.phase) == ("lora" if rule == "merge_lora" else rule, phase):
            return key_of(config, training, path)
    if first in ("weights", "train_tokens"):
        at = f"pretrain.phases[{_index(config, phase)}]" if phase else "sft"
        return f"{at}.blend ({rest})" if first == "weights" else f"{at}.tokens"
    if first == "splits":
        kind = Corpus if phase else ChatSource
        named = (at for at, source in config.sources() if isinstance(source, kind) and source.name == rest)
        return next((f"{at}.split" for at in named), None)
    key = first.partition("[")[0]  # of an entry of a list
    found = [
        (".".join(filter(None, (prefix, first, rest))), getattr(section, key))
        for prefix, section in _sections(config, wildcards)
        if hasattr(section, key)
    ]

    def how_far(one: tuple[str, Any]) -> int:
        """First what has the key; then what has others in its place, as arguments of templates; then null."""
        lacks = bool(rest) and isinstance(one[1], Mapping) and rest not in _flat(one[1])
        return 2 if one[1] is None else int(lacks)

    return min(found, key=how_far, default=(path, None))[0]


def key_of(config: Config, training: Training, path: str) -> str:
    """Where the configuration has the value at `path` of the settings of a training."""
    first, dot, rest = path.partition(".")
    tuning = training.section if training.packed else ""
    if first == "train_iters" and not tuning:
        return f"pretrain.phases[{_index(config, training.phase)}].tokens (steps)"
    if first == "data_seed":
        return f"pretrain.phases[{_index(config, training.phase)}].seed"
    if first == "schedule":
        keys = {"warmup": "warmup_iters", "end": "train_iters"}
        if tuning:
            return f"{tuning}.{keys.get(rest, path)}"
        keys = {"warmup": "pretrain.warmup_tokens", "decay": "pretrain.decay_tokens"}
        return keys.get(rest, f"pretrain.phases ({path})")
    if first in ("seed", "model", "lora"):
        return path
    return training.at(first) + dot + rest


def _index(config: Config, phase: str) -> int:
    return [one.name for one in config.pretrain.phases].index(phase)


def _sections(config: Config, wildcards: Mapping[str, str]) -> Iterator[tuple[str, Section]]:
    """Where keys of a job that is no training may stand, the nearest first."""
    for at, source in config.sources():
        if source.name == wildcards.get("corpus" if isinstance(source, Corpus) else "source"):
            yield at, source
            if isinstance(source, Corpus) and source.curation:
                yield f"{at}.curation", source.curation
            yield source.section, config.data_of(source)
    for i, phase in enumerate(config.pretrain.phases):
        if phase.name == wildcards.get("phase"):
            yield f"pretrain.phases[{i}]", phase
            yield "pretrain", config.pretrain
    yield "sft_data", config.sft_data
    yield "tokenizer", config.tokenizer
    yield "curation", config.curation
    yield "eval", config.eval
    yield "", config


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return shortened(text, LONGEST)
