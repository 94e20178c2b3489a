"""The configuration as Snakemake merges it, for the programs that run beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.config.doubled import check_doubled
from snaketron.log import UserError

DEFAULT_CONFIG = Path("config/config.yaml")


def merged(configfiles: Sequence[Path]) -> dict[str, Any]:
    """The defaults, and over them the files in their order."""
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError
    from snakemake.utils import update_config

    check_doubled([DEFAULT_CONFIG, *configfiles])
    config: dict[str, Any] = {}
    for path in [DEFAULT_CONFIG, *configfiles]:
        try:
            update_config(config, load_configfile(path))
        except (WorkflowError, OSError) as error:
            raise UserError(f"--configfile {path}: {error}") from None
    return config
