"""Which raw files a source of the configuration means, and what the shards are called."""

from __future__ import annotations

import hashlib
import os
import random
import re
from pathlib import Path
from typing import Any

from snaketron.config import ConfigError, Corpus
from snaketron.config.names import repeats
from snaketron.sources.formats import DOWNLOADED
from snaketron.sources.local import unread
from snaketron.sources.lockfile import read_lock
from snaketron.sources.shards import shards, to_download
from tests.unit.sources.locked import HUB, WEB, config, entry, listed, write_lock

import pytest
from snakemake.io import PeriodicityDetector


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def grouped(*paths: str, shard_size: int | None = None, **source: Any) -> dict[str, list[str]]:
    return shards(
        Corpus(name="docs", paths=list(paths), **source), "corpora[2]", read_lock("none"), shard_size
    )


def found(*paths: str) -> dict[str, str]:
    """The one file of each shard."""
    return {name: file for name, (file,) in grouped(*paths).items()}


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


@pytest.mark.parametrize(
    "pattern", ["raw", "raw/*/*.jsonl", "raw/**/*.jsonl", "raw/mine/*.jsonl", "r*/mine/*"]
)
def test_a_directory_that_may_not_be_read_is_named(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """A colleague's, or one after `chmod -R 644`. A glob passes over it. (To root all places are open.)"""
    touch("raw/mine/a.jsonl", "raw/hers/b.jsonl")
    closed = "raw/mine" if "mine" in pattern else "raw/hers"
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != closed)
    assert refusal(pattern) == f"corpora[2].paths[0]: {closed} cannot be read (Permission denied)"


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


def test_a_file_that_two_spellings_name_is_read_once(here: Path):
    touch("raw/a.jsonl")
    assert found("raw/a.jsonl", f"{here}/raw/a.jsonl") == {"a": "raw/a.jsonl"}


def test_links_to_directories_are_followed_and_each_directory_is_read_once():
    touch("raw/a.jsonl", "raw/deep/b.jsonl", "other/c.jsonl", "other/deeper/d.jsonl")
    for link, target in {"raw/link": "../other", "raw/again": "deep", "other/loop": "../raw"}.items():
        Path(link).symlink_to(target)
    expected = {
        "a": "raw/a.jsonl",
        "b": "raw/deep/b.jsonl",  # and not raw/again/b.jsonl
        "c": "raw/link/c.jsonl",
        "d": "raw/link/deeper/d.jsonl",
    }
    assert found("raw") == found("raw/**/*.jsonl") == found("raw/**") == expected


def test_a_link_to_a_file_that_is_gone_is_refused():
    touch("raw/a.jsonl")
    Path("raw/b.jsonl").symlink_to("/gone/b.jsonl")
    for path in ("raw", "raw/*", "raw/b.jsonl"):
        problem = "raw/b.jsonl is a link to /gone/b.jsonl, which does not exist"
        assert refusal(path).startswith(f"corpora[2].paths[0]: {problem}")


def test_what_is_not_read_is_named():
    touch("raw/a.jsonl", "raw/README.md", "raw/.b.jsonl", "raw/.cache/c.jsonl", "raw/d\udcff.txt")
    Path("raw/more").symlink_to("/gone/more")
    os.mkfifo("raw/e.jsonl")
    corpora = [Corpus(name="docs", paths=["raw", "raw/a.jsonl", "raw/*"])]
    assert unread(config(corpora=corpora)) == [
        "corpora[0].paths[0]: not read: raw/.b.jsonl, raw/.cache/, raw/README.md, 'raw/d\\udcff.txt', "
        "raw/e.jsonl and 1 more",
        "corpora[0].paths[2]: not read: raw/.b.jsonl, raw/.cache/, raw/e.jsonl, raw/more",
    ]
    assert unread(config(corpora=[*corpora, WEB])) == unread(config(corpora=corpora))


def test_a_data_set_of_datasets_is_its_data_files():
    """As `save_to_disk` writes it; what `map` left beside it is no data."""
    touch("set/data-00000-of-00001.arrow", "set/cache-1f.arrow", "set/dataset_info.json")
    Path("set/state.json").write_text(
        '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}', encoding="utf-8"
    )
    assert found("set") == {"data_00000_of_00001": "set/data-00000-of-00001.arrow"}
    assert unread(config(corpora=[Corpus(name="docs", paths=["set"])])) == [
        "corpora[0].paths[0]: not read: set/cache-1f.arrow"
    ]
    Path("set/data-00000-of-00001.arrow").unlink()
    assert refusal("set") == (
        "corpora[2].paths[0]: set is a data set whose file data-00000-of-00001.arrow is missing"
    )


def test_what_map_left_in_the_cache_of_datasets_is_no_data():
    touch("cache/c4-train.arrow", "cache/cache-1f.arrow", "cache/dataset_info.json")
    assert found("cache") == {"c4_train": "cache/c4-train.arrow"}


def test_what_is_no_file_is_named_for_what_it_is():
    Path("raw").mkdir()
    Path("raw/a.jsonl").symlink_to("a.jsonl")
    assert (
        refusal("raw")
        == "corpora[2].paths[0]: raw/a.jsonl cannot be read (Too many levels of symbolic links)"
    )
    assert refusal("x" * 300).endswith("x cannot be read (File name too long)")
    assert "corpora[2].paths[0]: /dev/null is a pipe, a socket or a device" in refusal("/dev/null")


def test_a_data_set_of_several_splits_is_refused_with_the_splits():
    touch("all/train/data-0.arrow", "all/test/data-0.arrow")
    Path("all/dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    assert refusal("all") == (
        "corpora[2].paths[0]: all is a data set with the splits train, test (save_to_disk of `datasets`); "
        "name the one to read: all/train"
    )
    Path("all/dataset_dict.json").write_text('{"splits": ["train"]}', encoding="utf-8")
    assert found("all/train") == {"data_0": "all/train/data-0.arrow"}


def test_a_file_of_the_sample_need_not_exist_yet():
    assert found("data/sample/docs/part_0.jsonl") == {"part_0": "data/sample/docs/part_0.jsonl"}


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("My File (1).jsonl", "my_file__1_"),
        ("UPPER.parquet", "upper"),
        ("naïve.jsonl", "na_ve"),
        ("a+b=c.jsonl.zst", "a_b_c"),
        ("UP.JSONL", "up"),
        ("a.ndjson", "a"),
        ("a.NDJSON.BZ2", "a"),
        ("a.json.xz", "a"),
        ("a[1].jsonl", "a_1_"),
    ],
)
def test_an_odd_file_name_becomes_a_plain_shard_name(name: str, shard: str):
    touch(f"raw/{name}")
    assert found(f"raw/{name}") == found("raw") == {shard: f"raw/{name}"}


@pytest.mark.parametrize("name", ["二" * 20, "a" + "0" * 25, "ab" * 20, "x" + "日本語" * 20])
def test_a_name_that_repeats_itself_is_one_that_snakemake_takes(name: str):
    """It refuses a value that ends in twenty times the same. Letters that are not Latin become `_`."""
    plain = re.sub(r"[^a-z0-9]", "_", name)
    assert PeriodicityDetector().is_periodic(plain)
    touch(f"raw/{name}.jsonl", f"more/{name}.jsonl")
    made = grouped("raw", "more")
    assert {*made} == {f"{plain}.{sha256(f'{of}/{name}.jsonl')}" for of in ("raw", "more")}
    assert not any(PeriodicityDetector().is_periodic(shard) for shard in made)


def test_what_repeats_is_what_snakemake_says():
    draw = random.Random(1)
    pieces = ["".join(draw.choices("ab_", k=draw.randint(1, 4))) for _ in range(500)]
    names = [draw.choice(pieces) + piece * draw.randint(15, 25) for piece in pieces]
    found = [repeats(name) for name in names]
    assert found == [bool(PeriodicityDetector().is_periodic(name)) for name in names]
    assert 100 < sum(found) < 400


def test_a_later_file_of_the_same_name_is_called_after_its_directory():
    touch("en/part_0.jsonl", "fr/part_0.jsonl", "fr/b.jsonl")
    assert found("en") == {"part_0": "en/part_0.jsonl"}
    added = {"b": "fr/b.jsonl", "part_0": "en/part_0.jsonl", "fr.part_0": "fr/part_0.jsonl"}
    assert found("en", "fr") == added  # and what was made of the first file stays
    assert list(found("en", "fr")) == list(added)
    # Groups by size stay as well: later files of a name come after the files that have it.
    assert grouped("en", "fr", shard_size=9**9) == {"b": [added[name] for name in added]}


def test_directories_are_taken_in_until_a_name_is_free(here: Path):
    touch("h/date=1/x/part-0.parquet", "h/date=2/x/part-0.parquet", "h/date=3/x/part-0.parquet")
    assert found("h") == {
        "part_0": "h/date=1/x/part-0.parquet",
        "x.part_0": "h/date=2/x/part-0.parquet",
        "date_3.x.part_0": "h/date=3/x/part-0.parquet",
    }
    touch("x.part-0.parquet")  # a file that is called so keeps its name, whoever comes first
    assert found("h", "x.part-0.parquet") == {
        "part_0": "h/date=1/x/part-0.parquet",
        "x.part_0": "x.part-0.parquet",
        "date_2.x.part_0": "h/date=2/x/part-0.parquet",
        "date_3.x.part_0": "h/date=3/x/part-0.parquet",
    }


def test_names_of_one_directory_that_differ_only_in_odd_letters_get_a_hash():
    long = "a" * 240
    touch("raw/文.jsonl", "raw/語.jsonl", f"raw/{long}.jsonl")
    assert found("raw") == {
        "_": "raw/文.jsonl",
        f"_.{sha256('raw/語.jsonl')}": "raw/語.jsonl",
        f"{'a' * 229}.{sha256(f'raw/{long}.jsonl')}": f"raw/{long}.jsonl",  # .NAME.parquet.partial has room
    }


def test_two_files_that_differ_only_in_their_format_are_refused():
    touch("x/a.jsonl", "x/a.jsonl.gz")
    assert refusal("x") == (
        "corpora[2].paths[0]: x/a.jsonl.gz and x/a.jsonl would both be shard 'a'; rename one"
    )
    lock = listed(("a.jsonl", 5), ("a.parquet", 7))  # edited by hand; lock_sources never writes this
    with pytest.raises(ConfigError, match="would both be shard 'a'; list them again"):
        shards(WEB, "corpora[0]", lock)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a{1}.jsonl", "'raw/a{1}.jsonl' holds a brace, which Snakemake takes for a wildcard; rename it"),
        (
            "a<ckpt>.jsonl",
            "'raw/a<ckpt>.jsonl' holds <ckpt>, which Snakemake takes for one of its pathvars; ",
        ),
        ("a\nb.jsonl", "'raw/a\\nb.jsonl' holds a line break or another control character; rename it"),
        ("a\udcff.jsonl", "'raw/a\\udcff.jsonl' is not UTF-8, which records are written in; rename it"),
        ("a\udcff{}/b.jsonl", "'raw/a\\udcff{}/b.jsonl' is not UTF-8"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(name: str, problem: str):
    touch(f"raw/{name}")
    assert refusal("raw").startswith(f"corpora[2].paths[0]: {problem}")


def test_a_path_that_starts_with_a_dash_is_made_absolute(here: Path):
    """Programs would take it for an option."""
    touch("-a.jsonl", "-raw/b.jsonl")
    assert found("*.jsonl", "-raw") == {"_a": f"{here}/-a.jsonl", "b": f"{here}/-raw/b.jsonl"}


def test_a_missing_file_is_named_with_where_it_was_looked_for(here: Path):
    assert refusal("raw/a.jsonl") == (
        f"corpora[2].paths[0]: raw/a.jsonl does not exist (relative paths start at {here})"
    )
    touch("a.jsonl")
    assert refusal("a.jsonl", "data/sample/docs/part_0.txt").startswith(
        "corpora[2].paths[1]: data/sample/docs/part_0.txt does not exist"
    )


def test_a_directory_or_glob_without_files_is_named_with_where_it_was_looked_for(here: Path):
    touch("raw/a.txt")
    start = f"(relative paths start at {here})"
    assert refusal("raw").startswith("corpora[2].paths[0]: no .jsonl, ")
    assert refusal("raw").endswith(f"file in the directory raw {start}")
    assert refusal("raw/*.jsonl") == f"corpora[2].paths[0]: no file matches raw/*.jsonl {start}"


def test_all_paths_without_a_file_are_named_at_once(here: Path):
    touch("raw/a.jsonl")
    start = f"(relative paths start at {here})"
    assert refusal("b.jsonl", "raw", "c/*.jsonl") == (
        f"corpora[2].paths[0]: b.jsonl does not exist {start}\n"
        f"corpora[2].paths[2]: no file matches c/*.jsonl {start}"
    )


def test_another_kind_of_file_is_refused_with_those_that_are_read():
    touch("raw/a.jsonl", "raw/b.csv")
    assert refusal("raw/*") == (
        "corpora[2].paths[0]: raw/b.csv is none of "
        ".jsonl, .ndjson or .json (also .gz, .zst, .bz2 or .xz), .parquet or .arrow"
    )


def test_a_file_name_that_is_only_a_suffix_is_refused():
    touch("raw/.jsonl")
    assert refusal("raw/.jsonl") == "corpora[2].paths[0]: raw/.jsonl has no name before .jsonl; rename it"


# Several files in one shard


def test_files_are_put_together_by_name_until_a_shard_is_large_enough():
    for name, size in {"d": 1, "a": 4, "c": 6, "b": 5, "e": 20, "f": 3}.items():
        Path(f"{name}.jsonl").write_text("x" * size, encoding="utf-8")
    assert grouped("*.jsonl", shard_size=10) == {
        "a": ["a.jsonl", "b.jsonl", "c.jsonl"],  # 4 + 5 are not 10 yet
        "d": ["d.jsonl", "e.jsonl"],
        "f": ["f.jsonl"],  # what is left
    }
    assert grouped("*.jsonl", shard_size=1000) == {"a": [f"{name}.jsonl" for name in "abcdef"]}
    assert list(grouped("*.jsonl", shard_size=1)) == list("abcdef")
    assert grouped("c.jsonl", "a.jsonl", shard_size=10) == {"a": ["a.jsonl", "c.jsonl"]}


def test_a_file_of_the_sample_is_a_shard_of_its_own_before_and_after_it_is_written():
    paths = [f"data/sample/docs/part_{i}.jsonl" for i in range(2)]
    before = grouped(*paths, shard_size=1000)
    touch(*paths)
    assert grouped(*paths, shard_size=1000) == before == {"part_0": [paths[0]], "part_1": [paths[1]]}


def test_a_limited_source_is_one_shard_in_the_order_of_the_configuration():
    touch("z/b.jsonl", "z/a.jsonl", "c.jsonl")
    for limit in ({"max_documents": 5}, {"max_tokens": 5}):
        assert grouped("z", "c.jsonl", shard_size=1, **limit) == {
            "sample": ["z/a.jsonl", "z/b.jsonl", "c.jsonl"]
        }


def test_only_the_first_files_are_used_when_so_configured():
    touch("z/b.jsonl", "z/a.jsonl", "c.jsonl")
    assert grouped("z", "c.jsonl", max_files=2) == {"a": ["z/a.jsonl"], "b": ["z/b.jsonl"]}
    assert grouped("z", "c.jsonl", max_files=1, max_documents=9) == {"sample": ["z/a.jsonl"]}


# Files that lie elsewhere


def test_files_that_lie_elsewhere_are_those_of_the_lock_below_the_data_root():
    lock = listed(("b.parquet", 7), ("a.jsonl.gz", 5))
    assert shards(WEB, "corpora[0]", lock) == {
        "a": ["<data>/raw/web/a.jsonl.gz"],
        "b": ["<data>/raw/web/b.parquet"],
    }
    assert shards(WEB, "corpora[0]", lock, 12) == {
        "a": ["<data>/raw/web/a.jsonl.gz", "<data>/raw/web/b.parquet"]
    }
    limited = WEB.model_copy(update={"max_documents": 3})
    assert shards(limited, "corpora[0]", lock) == {
        "sample": ["<data>/raw/web/b.parquet", "<data>/raw/web/a.jsonl.gz"]
    }


def test_a_dry_run_knows_what_is_not_here_yet():
    assert HUB.hub
    math = entry({"hub": HUB.hub.model_dump()}, ("x.parquet", 200_000_000))
    web = entry({"paths": WEB.paths}, ("a.parquet", 1_400_000_000), ("b.parquet", 2_000_000_000))
    lock = write_lock(math=math, web=web, not_used_here=web)
    assert to_download(config(), lock) == "To download: web 2 files, 3.4 GB; math 1 file, 200 MB"
    touch("data/raw/web/a.parquet", "data/raw/web/.b.parquet.partial", "data/raw/math/x.parquet")
    assert to_download(config(), lock) == "To download: web 1 file, 2.0 GB"
    first = WEB.model_copy(update={"max_files": 1})
    assert to_download(config(corpora=[*config().corpora[:1], first, HUB]), lock) is None
    touch("data/raw/web/b.parquet")
    assert to_download(config(), lock) is None
    elsewhere = config(pathvars={"data": "scratch"})
    assert to_download(elsewhere, lock) == "To download: web 2 files, 3.4 GB; math 1 file, 200 MB"


def test_the_record_of_a_downloaded_file_is_never_taken_for_a_download():
    downloads = [
        "a_1.jsonl",
        "a.json",
        "a.ndjson.bz2",
        "a.jsonl.xz",
        "a.json.zst",
        "a.jsonl.gz",
        "a.arrow",
        "a.parquet",
    ]
    others = ["a.parquet.json", "a.jsonl.json", "a.json.json", "A.json", ".a.json", "a/b.json", "a.gz"]
    assert [name for name in downloads + others if re.fullmatch(DOWNLOADED, name)] == downloads
