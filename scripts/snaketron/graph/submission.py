"""What is refused before Slurm gets it, because the executor plugin would let a shell read it.

The plugin writes a job as text, `sbatch ... --wrap="python -m snakemake ... --wait-for-files 'FILE'"`, and
has a shell run it. It quotes most of that with Python's `repr`, in which `$(...)` runs between double quotes,
and `slurm_extra` not at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from snaketron.config import ConfigError

_RUNS = re.compile(r"[$`\\]")  # special between double quotes too
_UNQUOTED = ("mem_mb", "mem_mb_per_cpu", "tasks")  # resources that the plugin writes as they are
# Text that a shell only takes the quotes from: no variable, command, glob or second command.
_PLAIN = re.compile(r"""(?:[\w\s=:,./@%+^-]|'[^']*'|"[^"$`\\]*")*""", re.ASCII)


def check_submission(workflow: Any, paths: Iterable[str]) -> None:
    """Raise `ConfigError` if a value that jobs on Slurm are submitted with would be read by a shell.

    `paths` are the files and roots that the user named: a job waits until it sees its inputs. With
    `--sdm apptainer`, on any machine, a shell gets the working directory in the command of each job.
    """
    here = check_words("the working directory", [str(Path.cwd())])
    in_image = any(method.name == "APPTAINER" for method in workflow.deployment_settings.deployment_method)
    if here and in_image:
        raise ConfigError("\n".join(here))
    settings = workflow.resource_settings
    resources = {"default-resources": settings.default_resources or {}}
    resources |= {f"set-resources {rule}": found for rule, found in settings.overwrite_resources.items()}
    if not any(name.startswith("slurm_") for found in resources.values() for name in found):
        return
    problems = [
        *check_resources(resources),
        *check_words("--config", workflow.config_settings.config_args or ()),
        *check_words("--configfile", map(str, workflow.overwrite_configfiles)),
        *check_words("the path", dict.fromkeys(paths)),
        *check_words("the Snakefile", [str(workflow.main_snakefile)]),
        *here,
        *check_words("the environment of Python", [sys.prefix]),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_words(where: str, words: Iterable[str]) -> list[str]:
    """Problems of words of the command line that are repeated in the command of each job."""
    problems = []
    for word in words:
        if found := _RUNS.search(word):
            why = f"holds {found[0]!r}"
        elif {"'", '"'} <= set(word) or word.startswith(("'", '"')):
            why = "mixes quotes"
        elif not word.isprintable():
            why = "holds a line break or another control character"
        elif word != word.strip():  # a job strips each line of the file that lists more than 20 inputs
            why = "begins or ends with a space"
        else:
            continue
        fix = "write it in a file for --configfile" if where == "--config" else "rename it"
        problems.append(f"{where} {word!r}: {why}, and would not reach a job as it is; {fix}")
    return problems


def check_resources(resources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Problems of the resources of a profile or the command line, by option and name."""
    problems = []
    for where, found in resources.items():
        for name, value in found.items():
            text = str(getattr(value, "raw", value))
            if name == "slurm_extra" and not _PLAIN.fullmatch(text):
                fix = "put single quotes around the value of that option of sbatch"
            elif name in _UNQUOTED and re.search(r"[$`;&|<>\n]", text):
                fix = "give a number"
            else:
                continue
            problems.append(f"{where}: {name} {text!r} would be read by a shell; {fix}")
    return problems
