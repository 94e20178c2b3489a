"""The keys of a plan, as `plan.plan` makes it, `plan.py --json` prints it and reports read it.

Bytes, tokens, hours and counts are numbers; what is not known is None.
"""

from __future__ import annotations

from typing import Any, TypedDict


class PlannedSource(TypedDict):
    """A corpus or a source of conversations."""

    shards: int | None
    raw_bytes: int | None
    estimated_tokens: float | None  # of the raw files, roughly


class PlannedCorpus(PlannedSource):
    train_tokens: int | None  # counted
    registered: bool


class PlannedChats(PlannedSource):
    rendered_bytes: int | None
    packed_bytes: int | None


class Taken(TypedDict):
    """What a phase takes of a corpus."""

    share: float
    tokens: float
    epochs: float | None


class PlannedTime(TypedDict):
    tokens_per_second_per_process: float | None
    speed_source: str | None
    hours: float | None
    process_hours: float | None
    published_hours: float | None
    published_source: str | None


class PlannedStep(TypedDict):
    """By what they go to; None where the GPU is not known."""

    step: dict[str, float] | None  # seconds
    sent: dict[str, dict[str, float]] | None  # bytes of a GPU, over each link


class PlannedTraining(PlannedTime, PlannedStep):
    name: str
    on_request: bool
    steps: int
    tokens: int
    seq_length: int
    global_batch_size: int
    processes: int
    nodes: int
    parallel: dict[str, Any]
    layers_of_stages: list[int]
    parameters: int
    active_parameters: int
    adapter_parameters: int | None
    flops_per_token: float
    flops: float
    memory: dict[str, Any]  # bytes of the fullest process; `fits` is None where no limit is known
    change_that_fits: str | None
    why_none_fits: str | None
    checkpoint_bytes: float
    checkpoints_kept: int
    corpora: dict[str, Taken]


class Plan(TypedDict):
    jobs: dict[str, int]  # by rule
    not_listed: list[str]  # sources that count as one assumed shard each
    missing: dict[str, str]  # the assumed ones that should lie on this machine, with what a run says of them
    corpora: dict[str, PlannedCorpus]
    trainings: list[PlannedTraining]
    disk: dict[str, Any]  # bytes; `estimated` names those that are estimates
