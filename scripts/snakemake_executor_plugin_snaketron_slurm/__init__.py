"""The executor `snaketron-slurm`: Snakemake finds a plugin by the name of its package."""

from snaketron.executor.executor import Executor, common_settings
from snaketron.executor.settings import ExecutorSettings

__all__ = ["Executor", "ExecutorSettings", "common_settings"]
