"""Makes `snakemake --logger snaketron` known: Snakemake finds plugins by the name of their package."""

from snaketron.graph.terminal import LogHandler

__all__ = ["LogHandler"]
