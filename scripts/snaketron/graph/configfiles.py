"""The files of --configfile: read and merged as Snakemake does, and which ones a run had."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from snaketron.config import Config, load
from snaketron.config.doubled import check_doubled
from snaketron.files import read_json, write_json
from snaketron.log import UserError

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEFAULT_CONFIG = Path("config/config.yaml")
_KEPT = Path(".snakemake/snaketron.config.json")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let a program take --configfile as Snakemake does."""
    said = "configuration files, as you give them to snakemake"
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help=said)


def configuration(configfiles: Sequence[Path]) -> Config:
    """The defaults, and over them the files in their order; `ConfigError` or `UserError`."""
    from snakemake.common.configfile import load_configfile
    from snakemake.utils import update_config

    if not DEFAULT_CONFIG.is_file():
        raise UserError(f"{DEFAULT_CONFIG}: no such file here; run this in the directory of the workflow")
    check_doubled([DEFAULT_CONFIG, *configfiles])
    config: dict[str, Any] = {}
    for path in [DEFAULT_CONFIG, *configfiles]:
        update_config(config, read(path, load_configfile))
    return load(config)


def read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What Snakemake's own function reads in a file of --configfile; `UserError` where it cannot be read."""
    from snakemake.exceptions import WorkflowError

    try:
        return load(path)
    except FileNotFoundError:
        raise UserError(f"--configfile {path}: no such file") from None
    except UnicodeDecodeError as error:
        said = f"is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        raise UserError(f"--configfile {path}: {said}") from None
    except (WorkflowError, OSError) as error:
        raise UserError(f"--configfile {path}: {_not_yaml(path) or error}") from None


def _not_yaml(path: Path) -> str | None:
    """Where a file is no YAML; None where it is. Snakemake says neither the file nor the line."""
    try:
        yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"is no YAML: {line}{error.problem}"
    except (yaml.YAMLError, OSError) as error:
        return str(error)
    return None


def mixed(configfiles: Sequence[str | Path]) -> str | None:
    """What to say of files that were not written for one another; None where there is nothing to say.

    A file of a machine comes after the one of a recipe, which names the layers of a model. Two recipes, two
    machines or the other order are no pair: keys of the first that the second does not name would stay.
    """
    before: tuple[str | Path, str, bool] | None = None
    for path in configfiles if len(configfiles) > 1 else ():
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader) or {}
        gpu = (values.get("cluster") or {}).get("gpu")
        if gpu is None:
            continue
        recipe = "hybrid_layer_pattern" in (values.get("model") or {})
        if before and (recipe or (not before[2] and gpu != before[1])):
            return (
                f"cluster.gpu is {before[1]} in {before[0]} and {gpu} in {path} after it, and keys of the "
                "first that the second does not name stay: give one recipe, and after it one machine"
            )
        before = path, gpu, recipe
    return None


def keep(config: Config, configfiles: Sequence[str | Path]) -> None:
    """Keep what a run is told, before its first job: with --config and the environment it is in no file."""
    told = {"configfiles": [str(path) for path in configfiles], "config": config.model_dump(mode="json")}
    write_json(_KEPT, told)


def of_last_run() -> tuple[Config, list[str]]:
    """What the last run here was told, and its files of --configfile; `UserError` where none has begun."""
    if not _KEPT.exists():
        raise UserError("no run has kept it here; name its files with --configfile")
    told = read_json(_KEPT)
    return load(told["config"], {}), told["configfiles"]
