"""Where an artifact comes from, down to the raw files, by the records beside what was made."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from snaketron.log import argument_parser, run

if TYPE_CHECKING:
    from snaketron.lineage.catalogue import Catalogue

FORMATS = ("text", "json", "mermaid", "openlineage")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("path", type=Path, nargs="?", help="checkpoint, shard, blend, export or record to ask about")
    add("--format", choices=FORMATS, default="text", help="how the tree is written")
    add("--verify", action="store_true", help="compare all files of the tree with their hashes")
    add("--all", action="store_true", help="with --verify: also read files that have not changed since")
    add("--root", type=Path, nargs="+", help="directories with records, if not the working directory")
    args = parser.parse_args(argv)
    if args.path is None:
        parser.error("name a PATH")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.lineage.catalogue import root_of, scan

    roots = args.root or [root_of(args.path)]
    catalogue = scan(*roots)
    if args.verify:
        return verify(catalogue, args.path, roots[0], all_again=args.all)
    return show_tree(catalogue, args.path, args.format)


def show_tree(catalogue: Catalogue, path: Path, form: str) -> int:
    from snaketron.lineage import formats, tree

    made = catalogue.about(path)
    if form == "json":
        print(json.dumps(formats.as_json(catalogue, made), indent=2))
    elif form == "openlineage":
        print("\n".join(map(json.dumps, formats.openlineage(catalogue, made))))
    elif form == "mermaid":
        print(tree.mermaid(catalogue, made))
    else:
        say(tree.show(catalogue, made))
    return 0


def verify(catalogue: Catalogue, path: Path, root: Path, *, all_again: bool) -> int:
    """The exit status: 1 where a file differs or is missing."""
    from snaketron.lineage.verify import STATE, State, named
    from snaketron.lineage.verify import verify as compare

    found = compare(named(catalogue, catalogue.about(path)), State(root / STATE, all_again=all_again))
    print("\n".join([*found.problems, found.told]))
    return 1 if found.problems else 0


def say(what: object) -> None:
    """Print for a terminal with its colours and width, and for anything else in lines as long as they are."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
        with console.capture() as captured:
            console.print(what)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    else:
        console.print(what)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    run(main)
