"""What is refused because a shell would read it on the way to Slurm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.config import ConfigError
from snaketron.graph.submission import check_resources, check_submission, check_words

import pytest
from snakemake.settings.types import DeploymentMethod
from snakemake_interface_executor_plugins.utils import format_cli_arg

RUN = "$(touch INJECTED)"


def workflow(*config: str, partition: str = "slurm_partition", **sft: Any) -> SimpleNamespace:
    return SimpleNamespace(
        resource_settings=SimpleNamespace(
            default_resources={partition: "cpu"}, overwrite_resources={"sft": sft}
        ),
        config_settings=SimpleNamespace(config_args=list(config)),
        overwrite_configfiles=[Path("my config.yaml")],
        main_snakefile="/data/it's here/Snakefile",
        deployment_settings=SimpleNamespace(deployment_method=set()),
    )


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (f"tokenizer={{text_field: 'a{RUN}'}}", "holds '$'"),
        ("seed=`id`", "holds '`'"),
        ("filters=[a\\d]", "holds '\\\\'"),
        ("""tokenizer={path: "it's"}""", "mixes quotes"),
        ("seed=1\nid", "holds a line break or another control character"),
        (" seed=1", "begins or ends with a space"),
    ],
)
def test_a_word_that_a_shell_would_change_is_refused(word: str, why: str):
    (problem,) = check_words("--config", [word])
    assert problem == (
        f"--config {word!r}: {why}, and would not reach a job as it is; write it in a file for --configfile"
    )


@pytest.mark.parametrize(
    "word", ["sft={train_iters: 3}", "a=it's", 'a={"b": 1}', "a=*;b|c > d & #~!", "a=naïve"]
)
def test_any_other_word_arrives_as_it_is(word: str, tmp_path: Path):
    """As the plugin writes it: in Python's quotes, and those in `--wrap`."""
    import subprocess

    assert check_words("--config", [word]) == []
    inner = "printf %s " + format_cli_arg("", [word]).strip()
    line = 'sh -c "' + inner.replace('"', '\\"') + '"'
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (word, "")


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        ("--requeue --open-mode=append --exclusive", True),
        ("--nodelist='n[1-4]' --comment=\"two words\"", True),
        (f"--comment='{RUN}'", True),
        (f"--comment={RUN}", False),
        (f'--comment="{RUN}"', False),
        ("--nodelist=n[1-4]", False),
        ("--requeue; id", False),
        ("--comment='open", False),
    ],
)
def test_options_of_sbatch_are_read_by_no_shell(extra: str, plain: bool):
    problems = check_resources(
        {"set-resources sft": {"slurm_extra": extra, "runtime": "max(1, 2) * attempt"}}
    )
    fix = "put single quotes around the value of that option of sbatch"
    said = f"set-resources sft: slurm_extra {extra!r} would be read by a shell; {fix}"
    assert problems == ([] if plain else [said])


def test_a_number_of_a_resource_is_no_command():
    found = {"mem_mb": "4000 * attempt", "tasks": f"1 {RUN}"}
    (problem,) = check_resources({"default-resources": found})
    assert problem == f"default-resources: tasks '1 {RUN}' would be read by a shell; give a number"


def test_a_working_directory_that_a_shell_would_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / RUN).mkdir()
    monkeypatch.chdir(tmp_path / RUN)
    with pytest.raises(ConfigError) as error:
        check_submission(workflow(), [])
    assert str(error.value).startswith(f"the working directory '{tmp_path}/{RUN}': holds '$', and would ")


def test_only_what_goes_to_slurm_is_checked():
    check_submission(workflow("seed=1", slurm_extra="--requeue"), ["a b.jsonl", "it's[1]*.jsonl"])
    check_submission(workflow(f"seed={RUN}", partition="mem_mb"), [RUN])
    with pytest.raises(ConfigError) as error:
        check_submission(workflow(f"seed={RUN}", slurm_extra=f"--comment={RUN}"), [f"raw/{RUN}.jsonl"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "set-resources sft",
        f"--config 'seed={RUN}'",
        f"the path 'raw/{RUN}.jsonl'",
    ]


def test_a_job_in_an_image_needs_a_directory_that_no_shell_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / f"it's {RUN}").mkdir()
    monkeypatch.chdir(tmp_path / f"it's {RUN}")
    here = workflow(partition="mem_mb")
    check_submission(here, [])
    here.deployment_settings.deployment_method.add(DeploymentMethod.APPTAINER)
    with pytest.raises(ConfigError, match=r"the working directory .* holds '\$'"):
        check_submission(here, [])
