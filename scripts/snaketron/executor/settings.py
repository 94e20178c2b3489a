"""The options `--snaketron-slurm-...` of Snakemake."""

# No `from __future__ import annotations`: Snakemake makes options of the types of these fields.

from dataclasses import dataclass, field
from typing import Optional

import snakemake_executor_plugin_slurm as plugin


@dataclass
class ExecutorSettings(plugin.ExecutorSettings):
    """The options of the plugin `slurm`. Those for its own way to ask for states have no effect.

    Their defaults are replaced too: the plugin runs `scontrol` for them in every Snakemake that starts, so
    in every job, too. `requeue` is always on.
    """

    status_command: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "Without effect: squeue is asked, and the jobs' own records."}
    )
    status_attempts: Optional[int] = field(default=None, metadata={"help": "Without effect."})  # noqa: UP045
