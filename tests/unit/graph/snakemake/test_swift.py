"""What is left out of Snakemake's work for each job: the answers are those of Snakemake."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.graph.snakemake import swift

import pytest
import snakemake.api
from snakemake import io
from snakemake.exceptions import ChildIOException
from snakemake.iocontainers import Namedlist
from snakemake.jobs import Job as Snakemakes
from snakemake.output_index import OutputIndex
from snakemake.pathvars import Pathvars
from snakemake.resources import Resource

DAG = snakemake.workflow.DAG  # the module of the graph cannot be imported by itself
FILES = [
    "a",
    io.AnnotatedString("a"),
    io.ancient("a"),
    io.directory("a"),
    io._IOFile(io.ancient("a"), rule=None),
    io._IOFile("a", rule=None),
    Path("a"),
    len,
]


@pytest.mark.parametrize("file", FILES, ids=repr)
@pytest.mark.parametrize("flag", ["ancient", "directory", "storage_object"])
def test_a_file_has_the_flags_that_snakemake_sees(file: Any, flag: str):
    assert swift.is_flagged(file, flag) == io.is_flagged(file, flag)
    if isinstance(file, io._IOFile):
        assert not swift.is_storage(file) and not file.is_storage


PATHS = [
    "a/b_1.json",
    "a.b-c/d",
    "",
    "./a",
    " a",
    "a ",
    "a\nb",
    "a//b",
    "a/",
    "/a/b",
    "a/{b c}",
    "a/{b}",
    "é",
]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_path_has_the_warnings_that_snakemake_gives(path: str, caplog: pytest.LogCaptureFixture):
    said = []
    for check in (io.check, swift.check_path(io.check)):
        caplog.clear()
        logging.getLogger("snakemake").addHandler(caplog.handler)
        check(path)
        logging.getLogger("snakemake").removeHandler(caplog.handler)
        said.append(caplog.messages[:])
    assert said[0] == said[1]


def test_roots_are_filled_in_as_snakemake_does():
    known = Pathvars._from_raw({"data": "/big/<disk>", "disk": "1"}, level=1)
    apply = swift.apply_pathvars(Pathvars.apply)
    assert apply(known, "<data>/a") == known.apply("<data>/a") == "/big/1/a"
    assert apply(known, "a/b") == known.apply("a/b") == "a/b"


@pytest.mark.parametrize("keys", [{}, {"plainstr": True}])
def test_a_list_with_names_holds_what_that_of_snakemake_holds(keys: dict[str, Any]):
    given = Namedlist(["a", "b", "c"])
    given._set_name("first", 0)
    given._set_name("others", 1, end=3)
    ours = Namedlist.__new__(Namedlist)
    swift.named_list(Namedlist.__init__)(ours, given, **keys)
    theirs = Namedlist(given, **keys)
    assert (list(ours), ours.first, ours.others) == (list(theirs), theirs.first, theirs.others)
    assert dict(ours.items()) == {"first": "a", "others": ["b", "c"]}
    with pytest.raises(AttributeError, match="cannot be used"):
        ours.sort()
    named = Namedlist.__new__(Namedlist)
    swift.named_list(Namedlist.__init__)(named, fromdict={"x": 1})
    assert named.x == Namedlist(fromdict={"x": 1}).x == 1


class Rule:
    def __init__(self, pattern: str) -> None:
        self.file, self.asked = io._IOFile(pattern, rule=None), 0

    def products(self) -> list[Any]:
        return [self.file]

    def is_producer(self, file: str) -> bool:
        self.asked += 1
        return bool(self.file.match(file))


def test_the_rule_that_makes_a_file_is_looked_for_once():
    rules = [Rule("data/{name}.json"), Rule("data/{name}.bin")]
    match = swift.makers(OutputIndex.match_producers)
    index = OutputIndex(rules)  # type: ignore[arg-type]
    for _ in range(3):
        assert match(index, "data/a.json") == OutputIndex.match_producers(index, "data/a.json") == {rules[0]}
        assert match(index, "data/none") == set()
    assert rules[0].asked == 4  # once here, and three times by Snakemake


@dataclass(eq=False)
class Job:
    output: list[str]


def of_jobs(*outputs: list[str]) -> Any:
    return SimpleNamespace(jobs=[Job(files) for files in outputs])


@pytest.mark.parametrize(
    "outputs",
    [
        [["data/index"], ["data/index.json"]],
        [["data/index", "data/index/a"]],
        [["ckpt/sft"], ["ckpt/sft2/a"]],
        [["/ckpt/a"], ["ckpt/a"]],
    ],
)
def test_jobs_may_write_side_by_side(outputs: list[list[str]]):
    swift.check_directory_outputs(of_jobs(*outputs))
    DAG.check_directory_outputs(of_jobs(*outputs))


@pytest.mark.parametrize("child", ["data/index/a", "data/index/a/b", "./data/index/a"])
def test_a_job_that_writes_where_another_one_does_is_refused(child: str):
    for check in (swift.check_directory_outputs, DAG.check_directory_outputs):
        with pytest.raises(ChildIOException, match="child to another output"):
            check(of_jobs(["data/index"], [child]))


def test_a_resource_that_is_a_number_is_itself_and_others_are_asked():
    def original(rule: Any, func: Any, wildcards: Any, **keys: Any) -> Any:
        return func(wildcards, **keys), False

    apply = swift.apply_input_function(original)
    number, asked = Resource("mem_mb", 7), Resource("mem_mb", lambda wildcards: 2 * wildcards)
    assert apply(None, number.evaluate, 4) == original(None, number.evaluate, 4) == (number, False)
    assert apply(None, asked.evaluate, 4)[0].value == 8


class Cache:
    """What Snakemake knows of files: `a` is there, `b` is not, and nothing is known of `c`."""

    def __init__(self) -> None:
        self.active, self.exists_local = True, io.ExistsDict(self)
        self.exists_local.update({"a": True, "b": False})


def test_what_is_known_of_a_file_is_not_asked_again():
    asked = []

    async def original(file: Any) -> bool:
        asked.append(str(file))
        return True

    rule = SimpleNamespace(workflow=SimpleNamespace(iocache=Cache()))
    files = []
    for name in "abc":
        file = io._IOFile(name, rule=None)
        file.rule = rule  # type: ignore[assignment]
        files.append(file)
    exists = swift.exists(original)
    assert [asyncio.run(exists(file)) for file in files] == [True, False, True]
    assert asked == ["c"]


def test_missing_outputs_are_those_that_do_not_exist_and_all_pipes():
    class File(str):
        flags: dict[str, Any]

        async def exists(self) -> bool:
            return self in ("there", "pipe")

    pipe = File("pipe")
    pipe.flags = {"pipe": True}
    job = SimpleNamespace(output_by_path={"pipe": pipe})

    async def missing() -> list[str]:
        return [file async for file in swift.missing_output(job, [File("there"), File("gone"), File("pipe")])]

    assert asyncio.run(missing()) == ["gone", "pipe"]


class Written:
    """A file that was written at a time; None where it is not there."""

    def __init__(self, at: float | None) -> None:
        self.at = at

    async def exists(self) -> bool:
        return self.at is not None

    async def mtime(self) -> io.Mtime:
        return io.Mtime(local=self.at)


@pytest.mark.parametrize(
    ("outputs", "benchmark", "oldest"),
    [([3, 2], None, 2), ([3, None], 1, 1), ([None], None, None), ([None], 4, 4), ([2], 5, 2)],
)
def test_the_oldest_output_is_that_of_snakemake(outputs: list[Any], benchmark: Any, oldest: float | None):
    async def both(job: Any) -> tuple[Any, Any]:
        return await swift.output_mintime(job), await Snakemakes.output_mintime.fget(job)

    job = SimpleNamespace(output=[Written(at) for at in outputs], benchmark=benchmark and Written(benchmark))
    assert asyncio.run(both(job)) == (oldest, oldest)
