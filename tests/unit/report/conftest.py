"""Lineage records of the data of a run, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config.data import SPLITS
from tests.records import record

import orjson
import pytest
import yaml


@pytest.fixture
def make(tmp_path: Path):
    """make(path, kind, *inputs, counts=..., ...): write a record; returns how a later one lists it."""

    def write(
        path: str,
        kind: str,
        *inputs: dict[str, Any],
        counts: dict[str, Any],
        settings: dict[str, Any] | None = None,
        name: str = "",
        **parts: Any,
    ) -> dict[str, Any]:
        made = record(kind, name or path, inputs=list(inputs), counts=counts, settings=settings or {})
        files.write_json(tmp_path / path, made | parts)
        return {"name": "records", "path": str(tmp_path / path), "sha256": files.sha256(tmp_path / path)}

    return write


def shard(train: int, valid: int, test: int, **counts: Any) -> dict[str, Any]:
    """Counts of a tokenized shard: tokens by split, of ten tokens a document and four bytes a token."""
    splits = {
        split: {"documents": tokens // 10, "tokens": tokens, "bytes": 4 * tokens}
        for split, tokens in zip(SPLITS, (train, valid, test), strict=True)
    }
    return {"documents": 100, "dropped": {"empty": 0}} | splits | counts


def packs(number: int, tokens: int, trained: int, packed: int, **dropped: int) -> dict[str, Any]:
    counts = {"packs": number, "tokens": tokens, "trained_tokens": trained, "packed": packed, "cut": 0}
    return counts | {"dropped": dropped, "length_histogram": {"4": packed} if packed else {}}


def share(corpus: str, asked: float, taken: int, tokens: int, present: float) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "asked": asked,
        "share": asked,
        "present": present,
        "documents": 1,
        "tokens": tokens,
        "taken": taken,
        "epochs": taken / tokens,
        "empty_shards": 0,
    }


@pytest.fixture
def records(make, tmp_path: Path) -> list[Path]:
    """Two shards of docs, one of them curated, one of code; a phase with an index, one without; chats."""
    bad = {"file": "raw/b.jsonl", "row": 7, "reason": "bad row", "detail": "invalid\n  JSON <b>"}
    curated_file = tmp_path / "curated/docs/b.parquet"
    curated_file.parent.mkdir(parents=True)
    curated_file.write_bytes(b"curated")
    output = {"name": "text", "path": str(curated_file), "sha256": files.sha256(curated_file)}
    example = {"file": "raw/b.jsonl", "row": 3, "text": "lorem " * 40}
    curated_counts = {
        "documents": 50,
        "tokens": 900,
        "kept": {"documents": 40, "tokens": 720},
        "removed": {
            "gopher_quality: too_short": {"documents": 8, "tokens": 120, "examples": [example] * 5},
            "exact duplicate": {"documents": 2, "tokens": 60, "examples": []},
        },
        "changed": {"pii": {"documents": 4, "tokens": -3}},
        "rows": 53,
        "replaced": 2,
        "dropped": {"bad row": 3},
        "dropped_rows": [bad],
    }
    make(
        "curated/docs/b.json", "curated", counts=curated_counts, name="docs/b", outputs=[output], seconds=4.5
    )
    docs, code = {"corpus": "docs"}, {"corpus": "code"}
    histogram = {"4": 90, "8": 9, "1024": 1}
    more = {"dropped": {"empty": 2}, "cut": 3, "checked": 20, "encoder": "fastokens", "fallback": None}
    a = make(
        "docs/a.json", "tokens", counts=shard(1000, 100, 0, length_histogram=histogram, **more), settings=docs
    )
    b = make(
        "docs/b.json",
        "tokens",
        output,
        counts=shard(3000, 0, 0, encoder="tokenizers", fallback="Unigram is not supported", replaced=5),
        settings=docs,
        name="docs/b",
        seconds=2.5,
    )
    c = make("code/a.json", "tokens", counts=shard(1000, 50, 50, encoder="fastokens"), settings=code)

    corpora = [share("docs", 0.25, 2000, 4000, 0.8), share("code", 0.75, 6000, 1000, 0.2)]
    last = []
    for phase in ("broad", "focused"):
        blend = tmp_path / "pretrain" / phase / "blend.json"
        files.write_json(blend, {"train": {"corpora": corpora}})
        output = {"name": "blend.json", "path": str(blend), "sha256": files.sha256(blend)}
        counts = {"repeated": {"code": 6.0} if phase == "broad" else {}}
        make(
            f"pretrain/{phase}/record.json", "blend", *(a, b, c), counts=counts, name=phase, outputs=[output]
        )
        if phase == "broad":
            counts = {"train": {"samples": 10, "corpora": {"docs": 3, "code": 7}}}
            settings = {"seq_length": 800}
            make("pretrain/broad/index.json", "index", output, counts=counts, settings=settings, name=phase)
            last.append(tmp_path / "pretrain/broad/index.json")
        else:
            last.append(tmp_path / "pretrain/focused/record.json")

    tools = {"source": "tools", "pack_size": 100}
    rendered = tmp_path / "chat/tools/a.parquet"
    rendered.parent.mkdir(parents=True)
    rendered.write_bytes(b"rendered")
    output = {"name": "chats", "path": str(rendered), "sha256": files.sha256(rendered)}
    counts = {"rows": 30, "dropped": {"unknown role": 4}, "dropped_rows": []}
    make("chat/tools/a.json", "render_chat", counts=counts, settings=tools, outputs=[output])
    splits = {"train": packs(4, 300, 90, 20, **{"longer than a pack": 1}), "valid": packs(1, 20, 6, 5)}
    splits["test"] = packs(0, 0, 0, 0)
    counts = {"splits": splits, "needed_pack_size": {"8": 5, "16": 20, "128": 1}}
    packed = make("sft/tools/a.json", "pack_sft", output, counts=counts, settings=tools)
    make("sft/record.json", "blend_sft", packed, counts={}, name="sft")
    return [*last, tmp_path / "sft/record.json"]


MODEL_SETTINGS = {"train_iters": 40, "seq_length": 256, "optimizer": {"learning_rate": 0.003}}


@pytest.fixture
def training(tmp_path: Path):
    """training(stage, outcome=..., ...): the version of a training of 40 steps; returns its directory."""

    def write(
        stage: str,
        *,
        steps: int = 40,
        outcome: str | None = "finished",
        base: str | None = None,
        root: Path = tmp_path,
        settings: dict[str, Any] | None = None,
        **attempt: Any,
    ) -> Path:
        directory = root / "ckpt/versions" / f"{stage.replace('/', '_')}-0123456789ab"
        (directory / "answers").mkdir(parents=True)
        told = {"stage": stage} | MODEL_SETTINGS | (settings or {})
        parallel = {"data_parallel_size": 2}
        run = {"parallel": parallel, "cluster": {"gpus_per_node": 8, "gpu": "h100"}}
        files.write_text(directory / "config.yaml", yaml.safe_dump({"settings": told, "run": run}))
        began = {"started": "2026-11-02T10:00:00+00:00", "job": None, "from_iteration": 0, "error": None}
        one = began | {"iteration": steps, "outcome": outcome, "seconds": 1800.0} | attempt
        files.write_json(directory / "attempts.json", [one])
        (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(m) + b"\n" for m in _metrics(steps)))
        for step in (0, steps) if outcome == "finished" else (0,):
            said = f"answer <b>{step}</b> " + "x" * 200
            answer = {"prompt": "What is a list?", "reference": "A sequence.", "answer": said}
            files.write_json(directory / f"answers/step_{step:07d}.json", [answer])
        if outcome == "finished":
            inputs = [{"name": "base", "path": "ckpt/base", "version": base}] if base else []
            made = record("checkpoint", stage, inputs=inputs, versions={"torch": "2.11.0"})
            files.write_json(directory / "record.json", made | {"key": "0123456789ab"})
        return directory

    return write


def _metrics(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"iteration": 0, "valid_loss": 7.5}]
    for step in range(1, steps + 1):
        timing = {"tokens_per_second_per_process": 1000.0 + step, "tflops_per_process": 0.5}
        timing |= {
            "peak_memory_gib": 2.0,
            "step_seconds": 10.0,
            "data_seconds": 0.1,
            "checkpoint_seconds": 0.0,
        }
        losses = {"loss": 7.5 - step / 20, "mtp_1_loss": 7.6 - step / 20, "load_balancing_loss": 1.0}
        values: dict[str, Any] = {
            "consumed_train_tokens": 1024 * step,
            "learning_rate": 0.003,
            "grad_norm": 1.0,
        }
        values |= {"grad_norm": 1.0, "experts": {"least": 0.5, "most": 2.0, "dead": 0}}
        if step == 7:
            values["warnings"] = [{"kind": "spike", "text": "the gradient norm is 9 times that of before"}]
        lines.append({"iteration": step} | losses | values | {"timing": timing})
    return [*lines, {"iteration": steps, "valid_loss": 5.6}]


@pytest.fixture
def job(tmp_path: Path):
    """job(name, said=..., seconds=...): the log of a job, and where it was done its benchmark."""

    def write(
        name: str,
        *,
        said: str = "",
        seconds: float | None = None,
        options: str = "",
        root: Path = tmp_path,
    ) -> None:
        files.write_text(root / f"logs/{name}.log", f"$ python scripts/x.py {options}\n{said}\n")
        if seconds is not None:
            files.write_text(root / f"benchmarks/{name}.tsv", f"s\tmax_rss\n{seconds}\t120.5\n")

    return write
