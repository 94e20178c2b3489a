"""The plan of a configuration, against Snakemake's own dry-run."""

from __future__ import annotations

import re
from pathlib import Path

import plan
from snaketron import files
from snaketron.log import UserError
from tests.conftest import Workspace

import pytest


def of(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, *configfiles: str) -> dict:
    monkeypatch.chdir(workspace.path)
    written = workspace.path / "plan.json"
    assert plan.main(["--configfile", *configfiles, "--json", str(written)]) == 0
    return files.read_json(written)


CURATED = """
corpora:
  - {name: docs, paths: [raw], curation: {exact_dedup: all, minhash_dedup: all, decontaminate: true}}
  - {name: code, paths: [data/sample/code/part_0.jsonl], curation: {exact_dedup: all}}
curation: {evaluation: [raw/a.jsonl], minhash: {num_buckets: 3}}
sft_data: {pack_across_shards: true}
tokenizer: {path: lab/tiny, chat_template: null}
"""


BASE = "tokenizer: {path: lab/tiny, chat_template: null}\nsft: {base: lab/tiny}\n"
MICRO = "tests/config/micro.yaml"


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (MICRO, "{}"),
        (MICRO, CURATED),
        (MICRO, BASE),
        (MICRO, BASE.replace("sft", "pretrain")),
        ("config/config.yaml", "{}"),
        ("config/super.yaml", "{}"),
        ("config/nano.yaml", "{}"),
    ],
    ids=["sample", "curated", "base of sft", "base of pretraining", "config", "super", "nano"],
)
def test_the_jobs_are_those_of_a_dry_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, config: str, more: str
):
    for name in "ab":
        workspace.write(f"raw/{name}.jsonl", '{"text": "mine"}\n')
    workspace.write("more.yaml", more)
    workspace.overlays = (config, "more.yaml")
    asked = workspace.snakemake("-n", "ckpt/sft")
    assert asked.status == 0, asked.output
    assert of(workspace, monkeypatch, *workspace.overlays)["jobs"] == asked.jobs


def test_the_plan_says_what_is_taken_and_what_it_needs(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """12 steps of 1,024 tokens, half of each corpus; epochs are not known before tokens are counted."""
    found = of(workspace, monkeypatch, "tests/config/micro.yaml")
    broad, focused, sft, lora = found["trainings"]
    assert (broad["steps"], broad["tokens"], broad["processes"]) == (12, 12_288, 1)
    assert broad["corpora"] == {
        name: {"share": 0.5, "tokens": 6144, "epochs": None} for name in ("docs", "code")
    }
    assert lora["on_request"] and not sft["on_request"]
    assert focused["memory"]["fits"] is None and focused["hours"] is None
    # The newest two, and of `focused` the one after step 2, where its rate begins to fall.
    assert [one["checkpoints_kept"] for one in (broad, focused, sft)] == [2, 3, 2]
    kept = sum(one["checkpoints_kept"] * one["checkpoint_bytes"] for one in (broad, focused, sft))
    assert found["disk"]["checkpoints"] == kept
    text = capsys.readouterr().out
    # Half of the 12,288 tokens of one phase, and all 8,192 of the other.
    assert re.search(r"\| corpus \| broad \| focused \|", text)
    assert re.search(r"\| docs +\| +50.0% \| +100.0% \| +14.3 k \| +- \|", text)
    assert re.search(r"\| code +\| +50.0% \| +- \| +6.1 k \| +- \|", text)
    assert found["disk"]["packs"] is None and found["trainings"][0]["sent"] is None


def test_the_layers_of_pipeline_stages_are_said(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    workspace.write("stages.yaml", "pretrain: {parallel: {pipeline_model_parallel_size: 2}}")
    broad, _, sft, _ = of(workspace, monkeypatch, MICRO, "stages.yaml")["trainings"]
    assert (broad["layers_of_stages"], sft["layers_of_stages"]) == ([2, 1], [3])
    said = [line for line in capsys.readouterr().out.splitlines() if "pipeline stages" in line]
    assert said == ["- pretrain/broad, focused: pipeline stages of 2, 1 layers"]


def test_recordings_have_a_column_where_layers_are_recorded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for cuda_graphs, there in (("null", False), ("true", True)):
        workspace.write(
            "more.yaml", f"pretrain: {{cuda_graphs: {cuda_graphs}}}\ncluster: {{gpus_per_node: 1}}\n"
        )
        broad, *_ = of(workspace, monkeypatch, MICRO, "more.yaml")["trainings"]
        assert (broad["memory"]["recordings"] > 0) is there
        assert ("| activations | recordings |" in capsys.readouterr().out) is there


def test_tokens_are_estimated_from_raw_files_before_they_are_counted(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """44,000 bytes of JSON lines are about 10,000 tokens, through which the phase goes 1.2 times."""
    workspace.write("raw/a.jsonl", "x" * 44_000)
    workspace.write(
        "more.yaml",
        "corpora: [{name: docs, paths: [raw]}, {name: code, paths: [raw/a.jsonl]}]\n"
        "pretrain: {phases: [{name: one, tokens: 12288, blend: [{corpus: docs, weight: 1}]}]}\n",
    )
    found = of(workspace, monkeypatch, "tests/config/micro.yaml", "more.yaml")
    assert found["corpora"]["docs"]["estimated_tokens"] == pytest.approx(10_000)
    assert found["trainings"][0]["corpora"]["docs"]["epochs"] == pytest.approx(1.2288)
    assert found["disk"]["training_tokens"] == pytest.approx(20_000)
    assert found["disk"]["estimated"] == ["training_tokens"]
    text = capsys.readouterr().out
    assert "about 10.0 k" in text and "about 20.0 kB" in text


def test_what_does_not_fit_is_named_with_a_change_that_does(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Sources that nobody listed yet are told, and count as one shard."""
    workspace.write(
        "more.yaml",
        "cluster: {gpu: h100, gpus_per_node: 8, gpu_memory_gb: 78}\n"
        "chats: [{name: questions, paths: ['s3://bucket/a.jsonl']}, {name: tools, paths: [nowhere]}]\n"
        "sft: {blend: [{source: questions, weight: 1}, {source: tools, weight: 1}]}\n",
    )
    found = of(workspace, monkeypatch, "config/super.yaml", "more.yaml")
    assert found["not_listed"][-2:] == ["questions", "tools"] and len(found["not_listed"]) == 32
    assert found["jobs"]["render_chat"] == 2 and found["jobs"]["tokenize_shard"] == 30
    step = found["trainings"][0]["step"]
    assert step["total"] == pytest.approx(sum(seconds for term, seconds in step.items() if term != "total"))
    broad, *_, lora = found["trainings"]
    assert broad["sent"]["experts"]["nvlink"] > 0 == broad["sent"]["experts"]["network"]  # EP 8, in a node
    assert broad["memory"]["fits"] is False and broad["change_that_fits"].startswith("pretrain.parallel: ")
    assert lora["memory"]["fits"] is True and lora["change_that_fits"] is None
    assert broad["tokens_per_second_per_process"] == pytest.approx(
        broad["tokens"] / broad["steps"] / step["total"] / 32
    )
    assert 2_700 < broad["tokens"] / broad["published_hours"] / 3600 / 32 < 2_800  # 2,789 were published
    assert "- pretrain/broad does not fit. What would: pretrain.parallel: " in capsys.readouterr().out


def test_where_no_layout_fits_the_plan_says_what_a_dry_run_says(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It said that no change of layout was found; bf16 is no way out where all is in bf16."""
    workspace.write("more.yaml", "cluster: {gpu: h100, gpus_per_node: 8, gpu_memory_gb: 1}\n")
    bf16 = "{gradient_precision: bf16, moment_precision: bf16}"
    workspace.write("bf16.yaml", f"sft: {{optimizer: {bf16}}}\n")
    of(workspace, monkeypatch, "config/super.yaml", "more.yaml", "bf16.yaml")
    said = capsys.readouterr().out
    none = "no layout of up to 16 times as many GPUs fits; "
    lower = "lower gradient_precision and moment_precision of pretrain.optimizer to bf16, or "
    assert f"- pretrain/broad does not fit. {none}{lower}take GPUs with more memory\n" in said
    assert f"- sft does not fit. {none}take GPUs with more memory\n" in said


def test_local_paths_without_a_file_are_named_apart_from_what_is_not_listed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    workspace.write(
        "more.yaml",
        "corpora: [{name: docs, paths: ['notes/*.txt', raw/none.jsonl]}, {name: code, paths: ['s3://b/a.jsonl']}]\n"
        "chats: [{name: questions, paths: ['support/*.jsonl']}, {name: tools, paths: ['s3://b/a.jsonl']}]\n",
    )
    found = of(workspace, monkeypatch, "tests/config/micro.yaml", "more.yaml")
    assert found["not_listed"] == ["docs", "code", "questions", "tools"]
    start = f"(relative paths start at {workspace.path})"
    text = capsys.readouterr().out
    assert "The files of code, tools are not known yet;" in text
    assert (
        "A run stops at docs, questions, of this machine; each counts as one file and one shard:\n\n"
        f"- corpora[0].paths[0]: no file matches notes/*.txt {start}\n"
        f"- corpora[0].paths[1]: raw/none.jsonl does not exist {start}\n"
        f"- chats[0].paths[0]: no file matches support/*.jsonl {start}\n"
    ) in text


def test_published_numbers_are_shown_beside_the_estimates(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--published"]) == 0
    assert "| parameters without multi-token prediction " in capsys.readouterr().out


def test_layouts_are_searched_for_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = ["--configfile", "config/super.yaml", "--gpu", "h100", "--gpus", "64", "--search"]
    assert plan.main([*asked, "pretrain/focused", "--json", str(tmp_path / "found.json")]) == 0
    text, found = capsys.readouterr().out, files.read_json(tmp_path / "found.json")
    assert text.startswith("# Layouts of pretrain/focused on 64 H100\n")
    assert found[0]["parallel"]["expert_model_parallel_size"] <= 8  # tokens stay within a node
    assert sum(found[0]["step"].values()) <= sum(found[1]["step"].values())
    with pytest.raises(
        UserError, match="--search focused: no training of that name; known: pretrain/broad, "
    ):
        plan.main([*asked, "focused"])
    with pytest.raises(UserError, match="--gpu and --gpus belong to --search TRAINING"):
        plan.main(["--gpus", "8"])


def test_epochs_follow_from_what_was_tokenized(copy: Workspace, monkeypatch: pytest.MonkeyPatch):
    found = of(copy, monkeypatch, *copy.overlays)
    there = sum(
        files.read_json(path)["counts"]["train"]["tokens"]
        for path in Path("data/tokens/docs").glob("part_?.json")
    )
    assert found["corpora"]["docs"]["train_tokens"] == there
    assert found["trainings"][1]["corpora"]["docs"]["epochs"] == 8192 / there
    counted = sum(corpus["train_tokens"] for corpus in found["corpora"].values())
    assert found["disk"]["training_tokens"] == 2 * counted  # of 1,024 ids, in 16 bits each
