"""What a user meets before the first job: names of targets, the sample, the environment of commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Workspace

import pytest

CONFIG = "pathvars={data: store, ckpt: /lustre/ckpt}"


def test_a_target_that_moved_is_named(workspace: Workspace):
    result = workspace.snakemake("-n", "ckpt/sft", config=(CONFIG,))
    assert result.status == 1
    assert "\nckpt/sft: pathvars.ckpt is /lustre/ckpt, so ask for /lustre/ckpt/sft\n" in result.output


def test_a_target_that_moved_is_named_though_an_old_file_is_there(workspace: Workspace):
    """Else Snakemake would say that there is nothing to be done."""
    workspace.write("data/report/report.md", "of another configuration")
    result = workspace.snakemake("-n", "data/report/report.md", config=(CONFIG,))
    assert (
        "\ndata/report/report.md: pathvars.data is store, so ask for store/report/report.md\n"
        in result.output
    )


def test_a_root_may_be_written_with_a_slash_at_its_end_and_a_dot_before_it(workspace: Workspace):
    """Snakemake would look for outputs below `./store//`, and warn of each."""
    target = "store/tokenizer/chat_template.jinja"
    result = workspace.snakemake("-n", target, config=("pathvars={data: ./store/, logs: logs/}",))
    assert result.status == 0 and result.jobs == {"install_chat_template": 1}, result.output
    assert "discouraged" not in result.output and "//" not in result.output


@pytest.mark.parametrize("name", ["mine.yaml", "ckpt/sft"])
def test_a_configuration_that_is_missing_is_named_in_a_line(workspace: Workspace, name: str):
    """A target after --configfile is taken for another file, and may be a directory."""
    (workspace.path / "ckpt/sft").mkdir(parents=True)
    workspace.overlays = ("tests/config/micro.yaml", name)
    result = workspace.snakemake("-n")
    assert result.status == 1 and "Traceback" not in result.output
    (said,) = (line for line in result.output.splitlines() if name in line)
    assert said == (
        f"error: --configfile {name}: no such file. The option takes every word up to the next option, "
        "so targets stand before it, or after `--`"
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sft.train_iters=200", "write --config 'sft={train_iters: 200}'"),
        ("sft.optimizer.learning_rate=1", "write --config 'sft={optimizer: {learning_rate: 1}}'"),
        ("=200", "'' is no key of the configuration"),
        (
            "ckpt/sft",
            "not KEY=VALUE. The option takes every word up to the next option, so targets stand before it, "
            "or after `--`",
        ),
    ],
)
def test_a_word_of_config_that_is_no_key_is_named_in_a_line(workspace: Workspace, word: str, said: str):
    """A target after --config is taken for another word."""
    result = workspace.snakemake("-n", config=("sft={num_samples: 3}", word))
    assert result.status == 1 and "Traceback" not in result.output
    assert f"error: --config {word}: {said}" in result.output.splitlines()


def test_what_stays_from_the_sample_is_one_line_of_a_dry_run(workspace: Workspace):
    workspace.write("raw/a.jsonl", '{"text": "mine"}\n')
    corpora = "corpora=[{name: docs, paths: [raw]}, {name: code, paths: [data/sample/code/part_0.jsonl]}]"
    lines = workspace.snakemake("-n", "ckpt/sft", config=(corpora,)).output.splitlines()
    (said,) = (line for line in lines if line.startswith("Still from the sample"))
    assert said.endswith(": corpora code; chats questions, tools; the text of the tokenizer (tokenizer.text)")


def test_snakemake_runs_without_an_activated_environment(workspace: Workspace):
    """And without a home to write to, which may be full, or absent on a node: here it is no directory."""
    program = Path(sys.executable).parent / "snakemake"
    home = workspace.write("home", "")
    done = subprocess.run(
        [program, *workspace.command("data/sample/questions/record.json")[1:]],
        cwd=workspace.path,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout


def test_names_of_files_are_utf8_whatever_the_locale(workspace: Workspace):
    """A shard would have another name, in another place of the blend, for whoever logs in with Latin-1."""
    workspace.write("naïve.jsonl", '{"text": "mine"}\n')
    corpora = (
        "corpora=[{name: docs, paths: [naïve.jsonl]}, {name: code, paths: [data/sample/code/part_0.jsonl]}]"
    )
    done = subprocess.run(
        workspace.command("-n", "data/tokens/docs/na_ve.json", config=(corpora,)),
        cwd=workspace.path,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(("option", "remembered"), [("-n", True), ("--list-rules", False)])
def test_a_dry_run_alone_asks_snakemakes_repeated_questions_once(
    workspace: Workspace, option: str, remembered: bool
):
    asked = "print('remembered:', hasattr(snakemake.common.get_function_params, 'cache_info'))"
    workspace.write("asked.smk", f'include: "Snakefile"\nimport snakemake.common\n{asked}\n')
    result = workspace.snakemake("-s", "asked.smk", option, "data/sample/questions/record.json")
    assert f"remembered: {remembered}\n" in result.output
