"""Makes `snakemake --logger snaketron` known: Snakemake finds plugins by the name of their package."""

from snaketron.graph.configfiles import name_what_is_missing
from snaketron.graph.terminal import LogHandler

__all__ = ["LogHandler"]

name_what_is_missing()
