"""Which raw files a source of the configuration means, and what the shards are called."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import ConfigError, Corpus
from snaketron.sources import shards

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(*paths: str) -> dict[str, str]:
    return shards(Corpus(name="docs", paths=list(paths)), "corpora[2]")


def refusal(*paths: str) -> str:
    with pytest.raises(ConfigError) as error:
        found(*paths)
    return str(error.value)


def test_a_file_is_a_shard_named_without_its_suffix():
    touch("a.jsonl", "raw/b.parquet", "c.v2.json.gz", "d.jsonl.zst", "e.jsonl.gz", "f.json", "g.json.zst")
    names = ["a.jsonl", "raw/b.parquet", "c.v2.json.gz", "d.jsonl.zst", "e.jsonl.gz", "f.json", "g.json.zst"]
    assert found(*names) == dict(zip(["a", "b", "c.v2", "d", "e", "f", "g"], names, strict=True))


def test_a_directory_is_its_raw_files_at_any_depth():
    touch("raw/b.jsonl", "raw/deep/er/a.parquet", "raw/README.md", "raw/c.txt")
    assert found("raw") == {"a": "raw/deep/er/a.parquet", "b": "raw/b.jsonl"}
    assert found("raw/") == found("raw")


def test_hidden_files_belong_to_downloaders_and_editors():
    touch("raw/a.jsonl", "raw/.a.jsonl.part", "raw/.b.jsonl", "raw/.cache/c.jsonl")
    assert found("raw") == found("raw/*.jsonl") == {"a": "raw/a.jsonl"}
    assert found("raw/.cache/*") == {"c": "raw/.cache/c.jsonl"}
    assert found("raw/.b.jsonl") == {".b": "raw/.b.jsonl"}  # it was asked for


def test_a_glob_is_the_files_that_match():
    touch("raw/2024/a_1.jsonl", "raw/2025/a_2.jsonl", "raw/2025/b.jsonl")
    Path("raw/2025/a_dir.jsonl").mkdir()
    assert found("raw/*/a_*.jsonl") == {"a_1": "raw/2024/a_1.jsonl", "a_2": "raw/2025/a_2.jsonl"}
    assert found("raw/**/b.jsonl") == {"b": "raw/2025/b.jsonl"}
    assert found("raw/2025/[b-c].json?") == {"b": "raw/2025/b.jsonl"}


def test_absolute_paths_and_globs_stay_absolute(here: Path):
    touch("raw/a.jsonl")
    assert found(f"{here}/raw/a.jsonl") == found(f"{here}/raw/*") == {"a": f"{here}/raw/a.jsonl"}


def test_shards_are_listed_by_name_whatever_the_order_of_the_paths():
    touch("c.jsonl", "a.jsonl", "b.jsonl")
    assert list(found("c.jsonl", "a.jsonl", "b.jsonl")) == ["a", "b", "c"]


def test_a_file_named_twice_is_one_shard():
    touch("raw/a.jsonl", "raw/b.jsonl")
    assert found("raw/a.jsonl", "raw", "raw/*.jsonl") == {"a": "raw/a.jsonl", "b": "raw/b.jsonl"}
    assert found("raw/a.jsonl", "./raw/a.jsonl") == {"a": "raw/a.jsonl"}


def test_a_file_of_the_sample_need_not_exist_yet():
    assert found("data/sample/docs/part_0.jsonl") == {"part_0": "data/sample/docs/part_0.jsonl"}


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("My File (1).jsonl", "my_file__1_"),
        ("UPPER.parquet", "upper"),
        ("naïve.jsonl", "na_ve"),
        ("a+b=c.jsonl.zst", "a_b_c"),
        ("a[1].jsonl", "a_1_"),
    ],
)
def test_an_odd_file_name_becomes_a_plain_shard_name(name: str, shard: str):
    touch(f"raw/{name}")
    assert found(f"raw/{name}") == found("raw") == {shard: f"raw/{name}"}


def test_two_files_of_one_shard_name_are_refused():
    touch("x/a.jsonl", "y/A.parquet")
    assert refusal("x", "y") == (
        "corpora[2].paths[1]: y/A.parquet and x/a.jsonl would both be shard 'a'; rename one"
    )


def test_a_missing_file_is_named_with_where_it_was_looked_for(here: Path):
    assert refusal("raw/a.jsonl") == (
        f"corpora[2].paths[0]: raw/a.jsonl does not exist (relative paths start at {here})"
    )
    touch("a.jsonl")
    assert refusal("a.jsonl", "data/sample/docs/part_0.txt").startswith(
        "corpora[2].paths[1]: data/sample/docs/part_0.txt does not exist"
    )


def test_a_directory_or_glob_without_files_is_named():
    touch("raw/a.txt")
    assert refusal("raw").endswith("file in the directory raw") and refusal("raw").startswith(
        "corpora[2].paths[0]: no .jsonl, "
    )
    assert refusal("raw/*.jsonl") == "corpora[2].paths[0]: no file matches raw/*.jsonl"


def test_another_kind_of_file_is_refused_with_those_that_are_read():
    touch("raw/a.jsonl", "raw/b.csv")
    assert refusal("raw/*") == (
        "corpora[2].paths[0]: raw/b.csv is none of "
        ".jsonl, .jsonl.gz, .jsonl.zst, .json, .json.gz, .json.zst, .parquet"
    )


def test_a_file_name_that_is_only_a_suffix_is_refused():
    touch("raw/.jsonl")
    assert refusal("raw/.jsonl") == "corpora[2].paths[0]: raw/.jsonl has no name before .jsonl; rename it"
