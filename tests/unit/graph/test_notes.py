"""What a user is told beside the plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.config import load
from snaketron.graph.notes import (
    from_sample,
    meant,
    moved_targets,
    other_vocabulary,
    read_again,
    replaced,
    unblended,
    unmeasured,
    unused_gpu,
)
from snaketron.lineage.record import making

import pytest

MINE = {
    "corpora": [
        {"name": "mine", "paths": ["raw/a.jsonl"]},
        {"name": "docs", "paths": ["data/sample/docs/part_0.jsonl"]},
    ]
}


def phases(*names: str) -> dict[str, Any]:
    blend = [{"corpus": name, "weight": 1} for name in names]
    return {"phases": [{"name": "one", "tokens": 300_000, "blend": blend}]}


def test_what_stays_from_the_sample_is_told():
    assert from_sample(load({}, {})) is None  # the sample alone is what was asked for
    said = from_sample(load(MINE | {"pretrain": phases("mine", "docs")}, {}))
    assert said == (
        "Still from the sample beside your own sources: corpora docs; chats questions, tools; "
        "the text of the tokenizer (tokenizer.text)"
    )


def test_what_no_training_reads_is_not_told():
    taken = {"tokenizer": {"path": "my/tokenizer"}, "chats": [{"name": "talk", "paths": ["raw/c.jsonl"]}]}
    taken["sft"] = {"blend": [{"source": "talk", "weight": 1}]}
    assert from_sample(load(MINE | taken | {"pretrain": phases("mine")}, {})) is None


def test_a_source_that_was_listed_and_blended_nowhere_is_told():
    """It is easily forgotten in a second list; the sample's sources are nobody's."""
    assert unblended(load({}, {})) is None
    assert unblended(load({"pretrain": phases("docs")}, {})) is None
    talk = {"chats": [{"name": name, "paths": ["raw/c.jsonl"]} for name in ("talk", "more")]}
    talk["sft"] = {"blend": [{"source": "talk", "weight": 1}]}
    assert unblended(load(MINE | talk | {"pretrain": phases("docs")}, {})) == (
        "In no blend, so nothing is trained on them: corpora mine; chats more"
    )
    assert unblended(load(MINE | {"pretrain": phases("mine", "docs")}, {})) is None


def test_a_gpu_that_no_node_has_is_told():
    """It is named for estimates, which are made for GPUs alone."""
    assert unused_gpu(load({}, {})) is None
    assert unused_gpu(load({"cluster": {"gpu": "h200", "gpus_per_node": 8}}, {})) is None
    said = unused_gpu(load({"cluster": {"gpu": "h200"}}, {}))
    assert said == (
        "cluster.gpu is h200 and cluster.gpus_per_node 0, so trainings are planned for CPUs and run there; "
        "say how many GPUs a node has"
    )


def test_a_phase_that_reads_the_text_of_an_earlier_one_again_is_told():
    """The samples of a shard are shuffled by the seed, and a phase takes the first of them."""

    def told(
        *seeds: int | None, names: tuple[str, ...] = ("mine", "docs"), lengths: tuple[int, ...] = ()
    ) -> list[str]:
        one = phases(*names)["phases"][0]
        found: list[dict[str, Any]] = [one | {"name": f"p{i}", "seed": seed} for i, seed in enumerate(seeds)]
        for phase, length in zip(found, lengths, strict=False):
            phase["seq_length"] = length
        return read_again(load(MINE | {"pretrain": {"phases": found}}, {}))

    assert told(None, None, 7) == [
        "pretrain.phases[1] (p1) reads again from the beginning, as phases before it did: mine (p0). Seed "
        "and length are the same; give it a `seed` of its own for other text"
    ]
    assert told(None, 1234) == told(None, None)  # the seed of the configuration
    assert told(None, 7) == []
    # With another length a corpus has another number of samples, and their order is another one.
    assert told(None, None, lengths=(256, 512)) == []
    assert told(None, None, lengths=(256,)) == told(None, None)  # the length of all phases
    assert told(None, None, names=("docs",)) == []  # the sample, as it comes
    assert read_again(load({}, {})) == []


def test_a_target_below_a_moved_root_has_another_name():
    config = load({"pathvars": {"data": "data", "ckpt": "/lustre/me/ckpt/"}}, {})
    targets = ["ckpt/sft", "./ckpt/pretrain/broad", "data/report/report.md", "sft", "/lustre/me/ckpt/sft"]
    assert moved_targets(config, targets) == [
        "ckpt/sft: pathvars.ckpt is /lustre/me/ckpt, so ask for /lustre/me/ckpt/sft",
        "./ckpt/pretrain/broad: pathvars.ckpt is /lustre/me/ckpt, so ask for /lustre/me/ckpt/pretrain/broad",
    ]
    moved = load({"pathvars": {"data": "store"}}, {})
    assert moved_targets(moved, ["data/sample/docs/record.json", "data/tokenizer/record.json"]) == [
        "data/tokenizer/record.json: pathvars.data is store, so ask for store/tokenizer/record.json"
    ]


def test_a_misspelt_target_is_answered_by_a_result_or_a_rule():
    targets = ["ckpt/stf", "eval/sft", "./ckpt/pretrain", "data_reprot", "ckpt/sft", "elsewhere"]
    assert meant(load({}, {}), targets, ["data_report"]) == [
        "ckpt/stf: did you mean ckpt/sft?",
        "eval/sft: did you mean eval/sft.json?",
        "./ckpt/pretrain: did you mean ckpt/pretrain/broad?",
        "data_reprot: did you mean data_report?",
    ]
    moved = load({"pathvars": {"hf": "/store/hf/"}}, {})
    assert meant(moved, ["/store/hf/sfd"]) == ["/store/hf/sfd: did you mean /store/hf/sft?"]
    # A base without the letters after its name: it was taken for merged/broad.
    found = meant(load({}, {}), ["hf/base/broad"], bases=["broad_4370e3"])
    assert found == ["hf/base/broad: did you mean hf/base/broad_4370e3?"]


def test_a_tokenizer_of_another_size_than_the_plan_takes_is_told(tmp_path: Path):
    def told(path: str | None = None, **tokenizer: Any) -> str | None:
        config = load({"tokenizer": {"path": path} | tokenizer, "pathvars": {"data": str(tmp_path)}}, {})
        return other_vocabulary(config, path or "")

    assert told(path="mine") is None  # it is not there
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "</s>": 2999}}}')
    assert told(path=str(theirs), vocab_size=3000) is None
    said = told(path=str(theirs))  # before anything is made
    assert said and f"2048, and the tokenizer in {theirs} has 3000 tokens" in said
    made = tmp_path / "tokenizer"
    made.mkdir()
    outputs = {"tokenizer.json": made / "tokenizer.json"}
    with making("tokenizer", "tokenizer", outputs=outputs, record=made / "record.json") as job:
        job.settings, job.counts = {"path": "mine"}, {"vocab_size": 40_000}
        job.aside["tokenizer.json"].write_text("{}")
    assert told(path="mine", vocab_size=40_000) is None
    assert told() is None  # a trained one, which may find pairs for less
    assert told(path="other") is None  # it takes the place of what is there
    assert told(path="mine") == (
        f"tokenizer.vocab_size is 2048, and the tokenizer in {made} has 40000 tokens: memory, times and "
        "pipeline stages are worked out for 2048; set it to 40000"
    )


def test_a_source_that_is_not_validated_is_told():
    assert unmeasured(load({}, {})) == []
    few = load(
        {"corpora": [{**MINE["corpora"][0], "max_documents": 20}, *MINE["corpora"][1:]]}
        | {"pretrain": phases("mine"), "sft_data": {"valid_fraction": 0}},
        {},
    )
    assert unmeasured(few) == [
        "sft_data.valid_fraction is 0, so no validation loss is measured on chats",
        "corpora: of max_documents 20 about 0.2 are held out (pretrain_data.valid_fraction 0.01), so there "
        "may be no validation loss of mine",
    ]


def test_a_source_that_is_held_out_is_validation_enough():
    mine = [
        {"name": "mine", "paths": ["a.jsonl"], "split": "train"},
        {"name": "held_out", "paths": ["b.jsonl"], "split": "valid", "max_documents": 5},
    ]
    none = {"pretrain_data": {"valid_fraction": 0}}
    assert unmeasured(load({"corpora": mine, "pretrain": phases("mine", "held_out")} | none, {})) == []
    assert unmeasured(load({"corpora": mine, "pretrain": phases("mine")} | none, {})) == [
        "corpora: no source in a blend is of split valid or null, so no validation loss is measured"
    ]


def test_what_is_held_out_in_two_phases_is_not_read_again():
    """As the text of the training is, it is read from the beginning each time, and shall be."""
    mine = [
        {"name": "mine", "paths": ["a.jsonl"]},
        {"name": "held_out", "paths": ["b.jsonl"], "split": "test"},
    ]
    (one,) = phases("mine", "held_out")["phases"]
    config = load({"corpora": mine, "pretrain": {"phases": [one, one | {"name": "two"}]}}, {})
    (line,) = read_again(config)
    assert "as phases before it did: mine (one)." in line


def test_a_limit_of_all_sources_is_told_once_and_of_those_that_are_trained_on():
    sources = [{"name": name, "paths": [f"raw/{name}.jsonl"]} for name in "abcdef"]
    limited = {"max_documents": 20}
    config = load({"corpora": sources, "pretrain_data": limited, "pretrain": phases(*"abcde")}, {})
    assert unmeasured(config) == [
        "corpora: of max_documents 20 about 0.2 are held out (pretrain_data.valid_fraction 0.01), so there "
        "may be no validation loss of a, b, c and 2 more"
    ]
    assert unblended(config) == "In no blend, so nothing is trained on them: corpora f"


def job(rule: str, **why: Any) -> SimpleNamespace:
    reason = {"missing_output": set(), "params_changed": None, "input_changed": False} | why
    return SimpleNamespace(rule=SimpleNamespace(name=rule), why=SimpleNamespace(**reason))


@pytest.mark.parametrize(
    ("jobs", "counted"),
    [
        ([job("build_tokenizer", params_changed="vocab_size")], "1 x build_tokenizer"),
        ([job("build_tokenizer", input_changed=True)], "1 x build_tokenizer"),
        ([job("tokenize_shard", params_changed="text_field")] * 3, "3 x tokenize_shard"),
        ([job("tokenize_shard", input_changed=True)], None),  # a shard that gets a further file
        ([job("tokenize_shard", params_changed="text_field", missing_output={"a"})], None),
        ([job("pack_sft", params_changed="pack_size")], None),  # cheap, and a size that one tries out
        ([job("build_tokenizer")], None),
    ],
)
def test_tokens_of_other_settings_are_not_replaced_in_silence(jobs: list[Any], counted: str | None):
    said = replaced(jobs, lambda job: job.why)
    if counted is None:
        assert said is None
    else:
        assert said and said.startswith(
            f"Made here with other settings, and replaced by this run: {counted}, and what is made from "
        )
