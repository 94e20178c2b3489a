"""What runs again after a change: each case by the job list of a dry-run on a finished run."""

from __future__ import annotations

import re
import shutil
from typing import Any

from snaketron.graph.base import Base
from snaketron.report.workflow import RULES
from tests.conftest import Workspace

import pytest
import yaml

BLEND = {"blend_pretrain": 1, "index_pretrain": 1}
TEXT = {"tokenize_shard": 1, **BLEND, "pretrain": 2, "sft": 1}


def jobs(workspace: Workspace, *config: str) -> dict[str, int]:
    result = workspace.snakemake("-n", "ckpt/sft", config=config)
    assert result.status == 0, result.output
    return result.jobs


def test_nothing_runs_again(copy: Workspace):
    """Nor after `-R $(snakemake --list-changes params)`: Snakemake alone lists an output of each job."""
    assert jobs(copy) == {}
    result = copy.snakemake("ckpt/sft", "--list-changes", "params")
    assert result.status == 0 and "data/" not in result.output and "ckpt/" not in result.output


def test_a_changed_raw_file_rebuilds_its_shard_and_what_follows(copy: Workspace):
    raw = copy.path / "data/sample/code/part_0.jsonl"
    raw.write_text(raw.read_text() + '{"text": "a new document"}\n')
    # Only the phase `broad` has code in its blend; `focused` starts from it.
    assert jobs(copy) == TEXT


def test_a_changed_chat_file_rebuilds_its_shard_and_sft(copy: Workspace):
    raw = copy.path / "data/sample/tools/part_0.jsonl"
    raw.write_text("\n".join(raw.read_text().splitlines()[1:]) + "\n")
    assert jobs(copy) == {"render_chat": 1, "pack_sft": 1, "blend_sft": 1, "sft": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # (a change of the configuration, what runs)
        (
            "pretrain={phases: [{name: broad, tokens: 12288, blend: "
            "[{corpus: docs, weight: 0.6}, {corpus: code, weight: 0.4}]}, "
            "{name: focused, tokens: 8192, blend: [{corpus: docs, weight: 1.0}]}]}",
            {**BLEND, "pretrain": 2, "sft": 1},
        ),
        ("pretrain_data={document_order: shuffled}", {"tokenize_shard": 3}),
        ("sft_data={pack_across_shards: true}", {"pack_sft": 2, "blend_sft": 1, "sft": 1}),
        ("sft_data={pack_size: 768}", {"pack_sft": 2, "blend_sft": 1, "sft": 1}),
        ("sft={blend: [{source: tools, weight: 1.0}]}", {"blend_sft": 1, "sft": 1}),
        ("sft_data={template_arguments: {enable_thinking: true}}", {"render_chat": 2}),
        ("sft_data={reasoning: {stripped: 0.5}}", {"render_chat": 2}),
        ("sft={train_iters: 13}", {"sft": 1}),
        ("sft={optimizer: {learning_rate: 0.002}}", {"sft": 1}),
        ("pretrain={optimizer: {learning_rate: 0.002}}", {"pretrain": 2, "sft": 1}),
        ("model={moe_router_topk: 3}", {"pretrain": 2, "sft": 1}),
        ("seed=5", {"index_pretrain": 2, "pretrain": 2, "sft": 1}),
        # How a training runs and is watched, and what no rule uses, make nothing run again.
        ("pretrain={log_interval: 1, save_interval: 3, micro_batch_size: 2}", {}),
        ("pretrain={parallel: {tensor_model_parallel_size: 2}}", {}),
        ("sft={parallel: {tensor_model_parallel_size: 2}, sample_interval: 3}", {}),
        # Each context parallel process wants two chunks of a conversation in a pack.
        ("sft={parallel: {context_parallel_size: 2}}", {"pack_sft": 2, "blend_sft": 1, "sft": 1}),
        ("pretrain_data={cpus_per_task: 2, max_epochs: 1.5}", {}),
        ("tracking=offline", {}),
        # These weights have the proportions of before: 0.5 and 0.5 in a phase, 0.02 and 0.98 in SFT.
        (
            "pretrain={phases: [{name: broad, tokens: 12288, blend: "
            "[{corpus: docs, weight: 7}, {corpus: code, weight: 7}]}, "
            "{name: focused, tokens: 8192, blend: [{corpus: docs, weight: 3}]}]}",
            {},
        ),
        ("sft={blend: [{source: questions, weight: 1}, {source: tools, weight: 49}]}", {}),
        ("tokenizer={vocab_size: 1100}", {"build_tokenizer": 1, "tokenize_shard": 3, "render_chat": 2}),
    ],
)
def test_a_changed_key_rebuilds_what_depends_on_it(copy: Workspace, change: str, expected: dict[str, int]):
    result = copy.snakemake("-n", "ckpt/sft", config=(change,))
    assert result.status == 0, result.output
    # Else two configurations of one directory would rebuild each other's tokens in silence.
    assert ("Made here with other settings, and replaced" in result.output) == ("tokenize_shard" in expected)
    if "tokenize_shard" in expected:  # of all text
        expected = expected | {"blend_pretrain": 2, "index_pretrain": 2, "pretrain": 2, "sft": 1}
    if "render_chat" in expected:
        expected = expected | {"pack_sft": 2, "blend_sft": 1, "sft": 1}
    assert result.jobs == expected


def test_a_dry_run_names_the_changed_key_and_what_each_training_will_do(copy: Workspace):
    """A changed second phase trains, and what follows from it. With the old settings nothing would train."""
    before, after = "pretrain.optimizer.learning_rate: 0.003", 0.002
    optimizer = f"pretrain={{optimizer: {{learning_rate: {after}}}}}"
    said = copy.snakemake("-n", "ckpt/sft", config=(optimizer, "sft={train_iters: 13}")).output
    assert f"{before} -> {after}" in said and len(max(said.splitlines(), key=len)) < 1000
    plan = said[said.index("Trainings:") :].splitlines()[1:4]
    assert [line.split(", about")[0] for line in plan] == [
        "  pretrain/broad     trains 12 steps, 12.3 k tokens",
        "  pretrain/focused   trains 8 steps, 8.2 k tokens",
        "  sft                trains 13 steps, 13.3 k tokens",
    ]
    (copy.path / "ckpt/sft").unlink()
    plan = copy.snakemake("-n", "ckpt/sft").output
    assert "sft                was trained before and is only published" in plan


def test_more_tokens_in_the_last_phase_leave_a_stable_first_phase_alone(copy: Workspace):
    """The decay of WSD lies in the last phase; a longer curriculum does not change the first one."""
    phases = yaml.safe_load((copy.path / "tests/config/micro.yaml").read_text())["pretrain"]["phases"]
    phases[1]["tokens"] *= 2
    change = f"pretrain={yaml.safe_dump({'phases': phases}, default_flow_style=True, width=10000).strip()}"
    result = copy.snakemake("-n", "ckpt/sft", config=(change,))
    assert result.jobs == {**BLEND, "pretrain": 1, "sft": 1}, result.output
    # Its rate fell over the last 6 of 8 steps; of 16 it has the first 2.
    assert "  pretrain/focused   continues at step 2 of 16, from pretrain_focused-" in result.output
    because = "starts over: other than before: the checkpoint that it starts from"
    assert because in next(line for line in result.output.splitlines() if line.startswith("  sft "))


def test_another_seed_of_a_phase_is_called_as_the_user_has_written_it(copy: Workspace):
    """In the reason of its jobs, and where the training says why it starts over."""
    phases = yaml.safe_load((copy.path / "tests/config/micro.yaml").read_text())["pretrain"]["phases"]
    phases[1]["seed"] = 5
    change = f"pretrain={yaml.safe_dump({'phases': phases}, default_flow_style=True, width=10000).strip()}"
    result = copy.snakemake("-n", "ckpt/sft", config=(change,))
    assert result.jobs == {"index_pretrain": 1, "pretrain": 1, "sft": 1}, result.output
    assert "pretrain.phases[1].seed: 1234 -> 5" in result.output
    focused = next(line for line in result.output.splitlines() if line.startswith("  pretrain/focused "))
    assert focused.endswith("starts over: other than before: pretrain.phases[1].seed")


def test_a_new_raw_file_is_tokenized_and_the_tokenizer_stays(copy: Workspace):
    copy.write("data/mine/new.jsonl", '{"text": "a document of mine"}\n' * 50)
    corpora = yaml.safe_load((copy.path / "tests/config/micro.yaml").read_text())["corpora"]
    corpora[1]["paths"].append("data/mine/new.jsonl")
    change = f"corpora={yaml.safe_dump(corpora, default_flow_style=True, width=10000).strip()}"
    assert jobs(copy, change) == TEXT


def test_a_changed_text_that_trained_the_tokenizer_leaves_it_alone(copy: Workspace):
    raw = copy.path / "data/sample/docs/part_0.jsonl"
    raw.write_text(raw.read_text() + '{"text": "a new document"}\n')
    blends = {"blend_pretrain": 2, "index_pretrain": 2}
    assert jobs(copy) == {"tokenize_shard": 1, **blends, "pretrain": 2, "sft": 1}


def test_a_changed_template_renders_chats_and_leaves_text_alone(copy: Workspace):
    template = (copy.path / "config/chat_template.jinja").read_text()
    copy.write("my_template.jinja", template + "\n")
    assert jobs(copy, "tokenizer={chat_template: my_template.jinja}") == {
        "install_chat_template": 1,
        "render_chat": 2,
        "pack_sft": 2,
        "blend_sft": 1,
        "sft": 1,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": "my_template.jinja"},
        {"template_arguments": {"low_effort": True}},
        {"sequences": "turn"},
        {"reasoning": {"truncated": 1}},
    ],
)
def test_what_a_source_says_renders_it_and_no_other(copy: Workspace, change: dict[str, Any]):
    template = (copy.path / "config/chat_template.jinja").read_text()
    copy.write("my_template.jinja", template + "\n")
    chats = yaml.safe_load((copy.path / "tests/config/micro.yaml").read_text())["chats"]
    chats[1] |= change
    config = f"chats={yaml.safe_dump(chats, default_flow_style=True, width=10000).strip()}"
    assert jobs(copy, config) == {"render_chat": 1, "pack_sft": 1, "blend_sft": 1, "sft": 1}


@pytest.mark.parametrize(
    ("gone", "change", "expected"),
    [
        (
            "sft/train/tools/part_0.parquet",
            "sft={train_iters: 13}",
            {"pack_sft": 1, "blend_sft": 1, "sft": 1},
        ),
        ("sft/test/tools/part_0.parquet", "sft={train_iters: 13}", {"pack_sft": 1, "blend_sft": 1, "sft": 1}),
        ("tokens/code/train/part_0.bin", "model={moe_router_topk: 3}", TEXT),
        (
            "sft/valid/tools/part_0.parquet",
            "sft={blend: [{source: questions, weight: 0.7}, {source: tools, weight: 0.3}]}",
            {"pack_sft": 1, "blend_sft": 1, "sft": 1},
        ),
    ],
)
def test_a_shard_that_is_gone_is_made_again_for_a_training(
    copy: Workspace, gone: str, change: str, expected: dict[str, int]
):
    """Trainings read it through the blend. They failed each time, since nothing made it again.

    So did a new blend for held-out data, which is none of its inputs.
    """
    (copy.path / "data" / gone).unlink()
    assert jobs(copy) == {}  # what is trained needs it no more
    result = copy.snakemake("-n", "ckpt/sft", config=(change,))
    assert result.jobs == expected
    assert f"Missing output files: data/{gone}" in result.output


def test_packs_that_failed_are_made_again_with_the_settings_of_before(copy: Workspace):
    """Snakemake deletes what a job that fails made before, and took the rest for up to date."""
    packed = copy.snakemake("ckpt/sft", config=("sft_data={pack_size: 64}",))
    assert packed.status == 1 and "sft_data.max_dropped_fraction" in packed.output
    assert not (copy.path / "data/sft/tools/part_0.json").exists()
    done = copy.snakemake("ckpt/sft", config=("sft={train_iters: 13}",))
    assert done.status == 0, done.output


def test_the_data_report_is_made_from_records_alone(copy: Workspace):
    result = copy.snakemake("-n", "data_report")
    assert result.status == 0 and result.jobs == {"data_report": 1}, result.output


def test_the_average_of_a_phase_is_made_evaluated_and_exported_beside_it(copy: Workspace):
    result = copy.snakemake("-n", "eval/merged/broad.json", "hf/merged/broad")
    assert result.jobs == {"merge_checkpoints": 1, "evaluate": 1, "export_hf": 1}, result.output


def test_a_base_from_elsewhere_is_evaluated_and_exported_beside_its_tuning(copy: Workspace):
    """One of Megatron: steps without a record."""
    trained = (copy.path / "ckpt/pretrain/focused").resolve()
    names = ["latest_checkpointed_iteration.txt", max(path.name for path in trained.glob("iter_*"))]
    (copy.path / "elsewhere").mkdir()
    for name in names:
        (trained / name).rename(copy.path / "elsewhere" / name)
    name = Base("elsewhere", (), None).name
    targets = (f"eval/base/{name}.json", f"hf/base/{name}")
    result = copy.snakemake("-n", *targets, config=("sft={base: elsewhere}",))
    assert result.jobs == {"import_base": 1, "evaluate": 1, "export_hf": 1}, result.output


TUNED = ("ckpt/sft", "ckpt/lora_merged", "eval/sft.json", "eval/lora.json", "hf/sft", "hf/lora_merged")
OF_A_PHASE = ("eval/pretrain/focused.json", "hf/pretrain/focused")
CURATION = ", curation: {exact_dedup: all, minhash_dedup: all, decontaminate: true}"


@pytest.mark.parametrize(("targets", "curation"), [(TUNED, ""), (OF_A_PHASE, CURATION)])
def test_the_page_of_a_run_draws_the_graph_that_snakemake_has(
    copy: Workspace, targets: tuple[str, ...], curation: str
):
    """Each rule comes from the same rules, through whichever others."""
    copy.write("questions.jsonl", '{"text": "Why?"}\n')
    named = (
        f"{{name: {name}, paths: [data/sample/{name}/part_0.jsonl]{curation}}}" for name in ("docs", "code")
    )
    config = (f"corpora=[{', '.join(named)}]", "curation={evaluation: [questions.jsonl]}")
    result = copy.snakemake(*targets, "--rulegraph", config=config)
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', result.output))
    edges = [(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", result.output)]
    assert len(edges) > 20, result.output
    drawn = [(need, rule) for rule in names.values() for need in RULES[rule][1] if need in names.values()]

    def above(rule: str, edges: list[tuple[str, str]]) -> set[str]:
        needs = {need for need, made in edges if made == rule and need != rule}  # a phase continues a phase
        return needs.union(*(above(need, edges) for need in needs))

    for rule in names.values():
        assert above(rule, drawn) == above(rule, edges), rule


def test_null_and_false_of_the_command_line_are_those_of_a_file(copy: Workspace):
    """`null` was the name of a container, and `false` a text that templates take for true."""
    default = ("sft={base: null, sample_interval: null}", "cluster={container: null}")
    assert jobs(copy, *default) == {}
    change = "sft_data={template_arguments: {enable_thinking: false}}"
    result = copy.snakemake("-np", "data/chat/tools/part_0.parquet", config=(change,))
    assert '"template_arguments":{"enable_thinking":false}' in result.output


def test_a_run_says_of_which_finished_jobs_no_changed_key_is_noticed(copy: Workspace):
    """A copy without Snakemake's notes trained on what other settings had made; only a dry-run said so."""
    chats, said = "data/chat/tools/part_0.parquet", "Snakemake has no notes, as in a copy without .snakemake"
    assert said not in copy.snakemake(chats).output
    shutil.rmtree(copy.path / ".snakemake/metadata")
    for command in ((chats,), (chats, "-n")):
        result = copy.snakemake(*command, config=("sft_data={template_arguments: {x: 1}}",))
        assert result.status == 0 and "Nothing to be done" in result.output
        assert result.output.count(said) == 1, result.output
    (copy.path / chats).unlink()
    result = copy.snakemake(chats)
    assert result.status == 0 and said in result.output.partition("render_chat tools part_0 starts")[0]


def test_a_comment_changes_nothing(copy: Workspace):
    shutil.copytree((copy.path / "config").resolve(), copy.path / "config_copy")
    (copy.path / "config").unlink()
    (copy.path / "config_copy").rename(copy.path / "config")  # copied with its times
    config = copy.path / "config/config.yaml"
    config.write_text("# a remark\n" + config.read_text().replace("seed: 1234", "seed:   1234  # mine"))
    assert jobs(copy) == {}
