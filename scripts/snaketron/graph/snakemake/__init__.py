"""Everything that replaces a piece of Snakemake, and why. pyproject.toml pins Snakemake to 9.27.1.

| module | what Snakemake does without it |
|---|---|
| `published` | deletes or copies a published checkpoint; takes a job that failed for up to date |
| `rerun` | passes over jobs that have to run again |
| `reasons` | tells all parameters of a job where one number has changed |
| `starting` | forgets a job that Ctrl-C finds in the moment of its start |
| `stopping` | hangs where SIGTERM finds it choosing or finishing jobs |
| `errors` | ends with a traceback where a target or a file of --configfile is wrong |
| `swift` | asks the same for each job of a dry-run |

A new release may end each of them: tests/graph/test_published.py and test_rerun.py show what Snakemake does
alone.
"""

from __future__ import annotations

from typing import Any

from snaketron.config import Config
from snaketron.graph.snakemake import errors, published, reasons, rerun, starting, stopping, swift

_replaced = False  # in this process


def replace_pieces(workflow: Any, config: Config) -> None:
    """Replace these pieces in this process: the first thing after the configuration is known."""
    global _replaced
    if _replaced:
        return
    _replaced = True
    if workflow.output_settings.dryrun:  # workflow.dryrun is known only after the Snakefile was read
        swift.remember()
    rerun.ask_each_job(config.pathvars.values())
    published.keep_what_failed()
    starting.start_whole()
    stopping.obey_sigterm()
    reasons.tell_changes(config)
    errors.tell_wrong_targets()
