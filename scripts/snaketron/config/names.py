"""Which names of files and roots the workflow can use. No shell reads them, but Snakemake and programs do.

Snakemake fills {wildcards} and <pathvars> into every path of a rule, records are JSON, which is UTF-8, and
programs take what starts with a dash for an option.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from snaketron.config.curation import Curation

if TYPE_CHECKING:
    from snaketron.config import Config

_PATHVAR = re.compile(r"<[a-z][a-z0-9_]*>")  # what Snakemake replaces
_REPEATED = re.compile(r"(.+?)\1{19}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def unusable(path: str) -> str | None:
    """Why the workflow cannot use a path, and what to do; None for one that it can use."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"{path!r} is not UTF-8, which records are written in; rename it"
    if _CONTROL.search(path):
        return f"{path!r} holds a line break or another control character; rename it"
    if "{" in path or "}" in path:
        return f"{path!r} holds a brace, which Snakemake takes for a wildcard; rename it"
    if found := _PATHVAR.search(path):
        return f"{path!r} holds {found[0]}, which Snakemake takes for one of its pathvars; rename it"
    return None


def repeats(name: str) -> bool:
    """Whether a name ends in twenty times the same, which no wildcard of Snakemake may be."""
    return name.count(name[-1:]) >= 20 and bool(_REPEATED.search(name))


def named_paths(config: Config) -> list[tuple[str, str]]:
    """The roots of outputs and the single files that the configuration names, with the key of each."""
    tokenizer, curation = config.tokenizer, config.curation
    named: list[tuple[str, str | None]] = [
        *((f"pathvars.{name}", root) for name, root in config.pathvars.items()),
        ("tokenizer.path", tokenizer.path),
        ("tokenizer.chat_template", tokenizer.chat_template),
        *((f"tokenizer.text[{i}]", path) for i, path in enumerate(tokenizer.text)),
        *((f"curation.evaluation[{i}]", path) for i, path in enumerate(curation.evaluation)),
        *((f"chats[{i}].chat_template", chats.chat_template) for i, chats in enumerate(config.chats)),
        *(
            (f"corpora[{i}].curation.filters[{j}].options.model", str(entry.options["model"]))
            for i, corpus in enumerate(config.corpora)
            for j, entry in enumerate((corpus.curation or Curation()).filters)
            if "model" in entry.options
        ),
    ]
    return [(at, path) for at, path in named if path is not None]


def check_paths(config: Config) -> list[str]:
    """Problems of `named_paths`; `sources.shards` checks raw files."""
    return [
        f"{at}: {problem}"
        for at, path in named_paths(config)
        if (problem := unusable(path) or _of_a_shell(path))
    ]


def check_roots(config: Config) -> list[str]:
    """Roots of outputs that cannot be made, or in which two rules would make the same file."""
    problems, roots = [], {str(name): root for name, root in config.pathvars.items()}
    for name, root in roots.items():
        there = Path(root)
        while not os.path.lexists(there):  # a forbidden place is not there either
            there = there.parent
        if not there.is_dir():
            led = f"leads to {str(there.readlink())!r}, which is not there" if there.is_symlink() else ""
            problems.append(
                f"pathvars.{name}: {root!r} cannot be made, because {str(there)!r} {led or 'is no directory'}"
            )
    first: dict[str, str] = {}  # by where a root leads, the first that leads there
    for name in ("data", "ckpt", "hf"):
        if name in roots and (other := first.setdefault(os.path.realpath(roots[name]), name)) != name:
            problems.append(
                f"pathvars.{name}: {roots[name]!r} is the directory of pathvars.{other}; both hold `sft`"
            )
    return problems


def _of_a_shell(path: str) -> str | None:
    """Why programs would take a path for something else; None where they would not."""
    if path.startswith("-"):
        return f"{path!r} starts with a dash, as the options of programs do; give the absolute path"
    if path.startswith("~/"):  # results would lie in a directory `~`, until somebody removes it by `rm -r ~`
        return f"{path!r}: only a shell reads ~ as your home; give the absolute path"
    return None
