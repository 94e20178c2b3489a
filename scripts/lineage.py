"""Where an artifact comes from and what was made of a file, by the records beside what was made."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.log import argument_parser, logger, run
from snaketron.wording import some

if TYPE_CHECKING:
    from snaketron.lineage.catalogue import Catalogue

FORMATS = ("text", "json", "mermaid", "openlineage")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("path", type=Path, nargs="?", help="checkpoint, shard, blend, export or record whose tree is shown")
    add(
        "--format",
        choices=FORMATS,
        default="text",
        help="form of the answer; json for all questions but --diff, mermaid and openlineage for a tree "
        "(default: text)",
    )
    add("--verify", action="store_true", help="compare all files of the tree with their hashes")
    add("--all", action="store_true", help="with --verify: read files again that have not changed, too")
    add("--who-uses", metavar="FILE", help="which jobs used a file; it may be named by its hash")
    add("--diff", type=Path, nargs=2, metavar=("A", "B"), help="why two artifacts differ")
    add(
        "--without",
        metavar="FILE",
        help="what has to be made again without a file, or without the rows of it that --row or --text name",
    )
    add(
        "--row",
        type=int,
        nargs="+",
        metavar="N",
        help="with --who-uses or --without: these rows of the file, from 1; --who-uses then says at which "
        "steps each was trained on",
    )
    add("--text", help="in place of --row: the rows that hold this text")
    add("--root", type=Path, nargs="+", help="directories with records, if not the working directory")
    args = parser.parse_args(argv)
    asked = [name for name in ("path", "who_uses", "diff", "without") if getattr(args, name) is not None]
    if len(asked) != 1:
        parser.error("ask one question: PATH, --who-uses, --diff or --without")
    if (args.row or args.text) and asked[0] not in ("who_uses", "without"):
        parser.error("--row and --text belong to --who-uses and --without")
    if (args.verify or args.all) and not (args.verify and asked == ["path"]):
        parser.error("--verify belongs to PATH, and --all to --verify")
    if args.format not in (("text", "json") if asked[0] in ("who_uses", "without") else FORMATS):
        parser.error(f"--format {args.format} is one of trees")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.lineage.catalogue import root_of, roots_of, scan
    from snaketron.lineage.uses import unknown

    if args.diff:
        return diff(*args.diff, args.root)
    file = args.who_uses or args.without
    roots = args.root or (roots_of(Path(file)) if file else [root_of(args.path)])
    catalogue = scan(*roots)
    if file and (lost := unknown(catalogue)):
        logger.warning(
            "not known of %s: the blends behind them were made again, or removed, since",
            some([made.version or made.title for made in lost]),
        )
    if args.who_uses:
        return who_uses(catalogue, args)
    if args.without:
        return without(catalogue, args)
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
        show(tree.show(catalogue, made))
    return 0


def verify(catalogue: Catalogue, path: Path, root: Path, *, all_again: bool) -> int:
    """The exit status: 1 where a file differs or is missing."""
    from snaketron.lineage.verify import STATE, State, named
    from snaketron.lineage.verify import verify as compare

    found = compare(named(catalogue, catalogue.about(path)), State(root / STATE, all_again=all_again))
    print("\n".join([*found.problems, found.told]))
    return 1 if found.problems else 0


def who_uses(catalogue: Catalogue, args: argparse.Namespace) -> int:
    from snaketron.lineage import uses, words

    source = uses.source(catalogue, args.who_uses)
    if args.row or args.text:
        from snaketron.data.trace import words as trace
        from snaketron.data.trace.fate import fates

        found = fates(catalogue, source, rows(catalogue, args.who_uses, args))
        answer(trace.told(catalogue, found), trace.as_json(catalogue, found), args.format)
    else:
        reached = uses.reach(catalogue, [source])
        by_kind = {"text_in": uses.by_kind(reached.holders), "influence_on": uses.by_kind(reached.influenced)}
        told = {"file": source.name, "sha256": source.identity, **by_kind}
        answer(words.used(source, reached), told, args.format)
    return 0


def without(catalogue: Catalogue, args: argparse.Namespace) -> int:
    from snaketron.data.trace import removal
    from snaketron.lineage.uses import by_kind

    name = args.without
    if name.endswith(removal.LIST):
        documents = removal.requested(Path(name))
    elif args.row or args.text:
        documents = [(name, row) for row in rows(catalogue, name, args)]
    else:
        documents = [(name, None)]
    found = removal.removal(catalogue, documents)
    told = {
        "again": by_kind(found.again),
        "training_steps": sum(made.record.settings["train_iters"] for made in found.trainings),
        "never_trained_on_them": by_kind(found.unseen),
        "influenced": by_kind(found.influenced),
    }
    answer(removal.told(found), told, args.format)
    return 0


def rows(catalogue: Catalogue, name: str, args: argparse.Namespace) -> list[int]:
    """The rows that are asked for."""
    from snaketron.data.trace.rows import rows_with
    from snaketron.lineage.uses import source

    return args.row or rows_with(source(catalogue, name), args.text)


def diff(one: Path, other: Path, roots: list[Path] | None) -> int:
    """The exit status: 1 where the artifacts differ, as that of `diff`."""
    from snaketron.lineage.catalogue import root_of, scan
    from snaketron.lineage.diff import Side, differences

    sides = []
    for path in (one, other):
        catalogue = scan(*(roots or [root_of(path)]))
        sides.append(Side(catalogue, catalogue.about(path)))
    found = differences(*sides)
    print("\n".join(found) or "no difference")
    return 1 if found else 0


def answer(lines: list[str], value: Any, form: str) -> None:
    print(json.dumps(value, indent=2) if form == "json" else "\n".join(lines))


def show(what: object) -> None:
    """Print for a terminal in its colours and width, and for anything else in lines as long as they are."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(what)
        return
    console = Console(width=10_000)
    with console.capture() as captured:
        console.print(what)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    run(main)
