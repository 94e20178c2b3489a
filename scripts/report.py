"""Make one page about runs, finished or not, from what lies in their directories; it needs no network."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from snaketron.log import UserError, argument_parser, logger, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from snaketron.report.runs import Run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "directories",
        type=Path,
        nargs="*",
        metavar="DIRECTORY",
        help="working directories of the workflow, several to compare them; this one if none is given",
    )
    parser.add_argument("--output", type=Path, required=True, help="the page, a file of HTML")
    parser.add_argument(
        "--configfile",
        type=Path,
        nargs="*",
        help="configuration files, in place of what the last run was told",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="nothing else works in the directory, as when the workflow itself makes the page",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.credentials import Redact
    from snaketron.files import write_text
    from snaketron.report.report import report

    from markupsafe import escape

    directories = [path.resolve() for path in args.directories or [Path()]]
    names = unique_names(directories)
    runs = [
        read(path, name, args.configfile, alone=args.alone)
        for path, name in zip(directories, names, strict=True)
    ]
    page = report(runs)
    for secret in Redact().values:
        page = page.replace(secret, "[secret]").replace(escape(secret), "[secret]")
    write_text(args.output, page)
    for one in runs:
        logger.info(
            "%s: %s, %d trainings, %d records", one.name, one.state, len(one.stages), len(one.records)
        )
    logger.info("%s: %.0f kB", args.output, len(page.encode()) / 1000)
    return 0


def unique_names(directories: list[Path]) -> list[str]:
    """The names of directories, with so many of their parents that no two are the same."""
    for length in range(1, max(len(path.parts) for path in directories) + 1):
        names = [str(Path(*path.parts[-length:])) for path in directories]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{directories[0]}: named twice")


def read(directory: Path, name: str, configfiles: list[Path] | None, *, alone: bool) -> Run:
    """What lies in a directory, with the plan of its configuration where that can be read."""
    from snaketron.config import load
    from snaketron.graph.asked import asked
    from snaketron.graph.configfiles import configuration, of_last_run
    from snaketron.graph.plan import plan
    from snaketron.lineage.diff import changed
    from snaketron.report.runs import read_run

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    planned, changes, roots, trouble = None, None, {}, []
    is_asked: Callable[[str], bool] | None = None
    with contextlib.chdir(directory):
        files = [str(path) for path in configfiles or ()]
        try:
            config, files = of_last_run() if configfiles is None else (configuration(configfiles), files)
            changes = changed(load({}, {}).model_dump(mode="json"), config.model_dump(mode="json"))
            roots = dict(config.pathvars)
            planned, is_asked = plan(config), asked(config)
        except (UserError, OSError, ValueError) as error:
            named = ", ".join(files) or "of the last run"
            trouble.append(f"The configuration ({named}) cannot be read: {error}.")
    every = is_asked or (lambda log: True)
    found = read_run(directory, roots, planned, name=name, alone=alone, asked=every)
    found.changes, found.configfiles = changes, files
    found.trouble += trouble
    return found


if __name__ == "__main__":
    run(main)
