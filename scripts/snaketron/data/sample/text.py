"""Sample text: the real prose and code that every Python installation carries, read without importing it.

They depend only on the versions of Python and of the packages in `PACKAGES`. No path of this machine is in
them. The corpus `requests` is made up (`requests.py`).
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from snaketron.data.sample.requests import Row, texts
from snaketron.lineage.record import Record, making

import orjson

CODE_BYTES = 8_000_000  # of source in the corpus `code`
GROUP_BYTES = 10_000  # longer modules become several documents, cut between their classes and functions
PACKAGE_BYTES = 200_000  # of docstrings a package, so that a large one does not drown the others
SHORTEST = 20  # characters of a docstring worth keeping

# Direct dependencies, whose versions are pinned: the text stays when others are installed beside them.
PACKAGES = (
    "aiohttp",
    "datasets",
    "datatrove",
    "einops",
    "fsspec",
    "huggingface-hub",
    "jinja2",
    "matplotlib",
    "megatron-core",
    "nltk",
    "numpy",
    "orjson",
    "pyarrow",
    "pydantic",
    "snakemake",
    "spacy",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
)

_SKIPPED = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "site-packages",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "_vendor",
}


class Documented(NamedTuple):
    """A module, class or function with a docstring."""

    name: str  # dotted, with its module
    signature: str  # "" for a module
    doc: str


def write(name: str, rows: Iterable[Row], paths: Sequence[Path], record: Path) -> Record:
    """Deal the rows round robin to JSON lines files, write `record` last and return it."""
    outputs = {path.name: path for path in paths}
    with making("sample", name, outputs=outputs, record=record) as job:
        lines = [orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows]
        for i, path in enumerate(job.aside.values()):
            path.write_bytes(b"".join(lines[i :: len(paths)]))
        job.counts = {"rows": len(lines), "bytes": sum(map(len, lines))}
    return job.record


# ------------------------------------------------------------------------------------------- corpora


def docs() -> Iterator[Row]:
    """The language reference's topics, and the docstrings of the standard library, a document a module."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield _row(f"docs/topics/{topic}", text)
    for module, path in standard_library():
        for i, text in enumerate(_pages(documented(module, path))):
            yield _row(f"docs/modules/{module}/{i}", text)


def code() -> Iterator[Row]:
    """The standard library's source, up to CODE_BYTES."""
    total = 0
    for module, path in standard_library():
        if module.startswith("pydoc_data"):  # is in `docs`
            continue
        for i, text in enumerate(groups(_read(path))):
            if (total := total + len(text)) > CODE_BYTES:
                return
            yield _row(f"code/{module}/{i}", text)


def packages() -> Iterator[Row]:
    """The descriptions and docstrings of `PACKAGES`."""
    for name in PACKAGES:
        distribution = importlib.metadata.distribution(name)
        description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(description, str) and len(description) >= SHORTEST:
            yield _row(f"packages/{name}/description", description)
        size = 0
        for module, path in _sources(distribution):
            if size >= PACKAGE_BYTES:
                break
            for i, text in enumerate(_pages(documented(module, path))):
                size += len(text)
                yield _row(f"packages/{name}/{module}/{i}", text)


def requests() -> Iterator[Row]:
    """What users of three tools want, and the calls that do it."""
    for i, text in enumerate(texts()):
        yield _row(f"requests/{i}", text)


CORPORA: dict[str, Callable[[], Iterator[Row]]] = {
    "docs": docs,
    "code": code,
    "packages": packages,
    "requests": requests,
}


def _row(identifier: str, text: str) -> Row:
    return {"id": identifier, "text": text}


def _pages(entries: Iterable[Documented]) -> Iterator[str]:
    """Entries in documents of about GROUP_BYTES."""
    return _grouped(f"{entry.name}{entry.signature}\n\n{entry.doc}\n\n" for entry in entries)


def _grouped(pieces: Iterable[str]) -> Iterator[str]:
    """Join pieces to groups of about GROUP_BYTES; a decorator stays with what it decorates."""
    group = previous = ""
    for piece in pieces:
        if group and len(group) + len(piece) > GROUP_BYTES and not previous.startswith("@"):
            yield group
            group = ""
        group += piece
        previous = piece
    if group.strip():
        yield group


# --------------------------------------------------------------------------------------------- source


def standard_library() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of the standard library's modules, in the order of the names, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {path.relative_to(root): path for path in root.rglob("*.py")}
    for relative, path in sorted(found.items()):
        # _sysconfigdata holds the paths that this Python was built with
        if relative.parts[0].removesuffix(".py") in sys.stdlib_module_names and _wanted(relative):
            yield _module(relative), path


def _wanted(relative: Path) -> bool:
    return not _SKIPPED.intersection(relative.parts) and not relative.name.startswith(
        ("_sysconfigdata", "test_")
    )


def _module(relative: Path) -> str:
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def _sources(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for path in sorted(Path(file) for file in distribution.files or ()):
        if path.suffix == ".py" and ".." not in path.parts and _wanted(path):
            yield _module(path), Path(str(distribution.locate_file(path)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError):
        return ""


def documented(module: str, path: Path) -> list[Documented]:
    """A module and its public classes, functions and methods, as far as they have docstrings."""
    source = _read(path)
    if '"""' not in source and "'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    entries = [Documented(module, "", doc)] if (doc := _doc(tree)) else []
    for node in tree.body:
        entries += _entries(node, module)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                entries += _entries(member, f"{module}.{node.name}")
    return entries


def _entries(node: ast.stmt, where: str) -> list[Documented]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith(
        "_"
    ):
        return []
    doc = _doc(node)
    if not doc:
        return []
    signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
    return [Documented(f"{where}.{node.name}", signature, doc)]


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    doc = ast.get_docstring(node, clean=False)
    doc = inspect.cleandoc(doc) if doc else ""
    return doc.encode("utf-8", "replace").decode() if len(doc) >= SHORTEST else ""


_TOP_LEVEL = re.compile(r"^(?=@|class |def |async def )", re.MULTILINE)


def groups(source: str) -> Iterator[str]:
    """A source file in documents of about GROUP_BYTES, cut where a class or function begins."""
    return _grouped(_TOP_LEVEL.split(source))
