"""Bad input ends in one clear error, at the place where it is, and leaves nothing half-written."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

from snaketron import files
from tests.conftest import Result, Workspace
from tests.end_to_end.processes import kill_forked, run_forked, saved, shell_lines

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

ROWS = [json.dumps({"text": f"document {i} of mine"}) for i in range(2000)]
RANDOM = [files.sha256_of(i) for i in range(20_000)]  # does not compress, so a cut file has whole rows


def run(workspace: Workspace, line: str, *, limit_kib: int | None = None) -> Result:
    """Run a printed command; `limit_kib` is the largest file that it may write, as if the disk was full."""
    limit = f"ulimit -f {limit_kib}; " if limit_kib else ""
    return workspace.run("bash", "-c", limit + line)


def refused(result: Result, *messages: str) -> None:
    """The command failed, said why, and did not show our code."""
    assert result.status not in (0, None), result.output[-3000:]
    for message in messages:
        assert message in result.output, result.output[-3000:]
    assert "Traceback" not in result.output, result.output[-3000:]


def partials(workspace: Workspace) -> list[Path]:
    return [p for root in ("data", "ckpt") for p in (workspace.path / root).rglob(".*.partial")]


def line_for(workspace: Workspace, output: str, *config: str) -> str:
    """The command that makes `output`, as a dry-run prints it."""
    (line,) = (line for line in shell_lines(workspace, output, *config) if f"--output {output} " in line)
    return line


# ------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sft={train_iter: 10}", "sft.train_iter: unknown key; did you mean 'train_iters'?"),
        ("pretain={seq_length: 10}", "pretain: unknown key; did you mean 'pretrain'?"),
        (
            "pretrain={parallel: {tensor_model_parallel_size: 3}}",
            "model.num_attention_heads 8 is not divisible by pretrain.parallel.tensor_model_parallel_size 3",
        ),
        (
            "sft={global_batch_size: 2, parallel: {data_parallel_size: 3}}",
            "sft.global_batch_size 2 is not divisible by micro_batch_size 1 x data_parallel_size 3 = 3",
        ),
        (
            "corpora=[{name: docs, paths: [raw/none.jsonl]}, {name: code, paths: [raw]}]",
            "corpora[0].paths[0]: raw/none.jsonl does not exist (relative paths start at ",
        ),
        (
            "chats=[{name: questions, paths: ['raw/*.jsonl']}, {name: tools, paths: [raw]}]",
            "chats[0].paths[0]: no file matches raw/*.jsonl",
        ),
    ],
)
def test_a_dry_run_finds_what_is_wrong_in_the_configuration(workspace: Workspace, config: str, message: str):
    result = workspace.snakemake("-n", config=(config,))
    refused(result, "error: The configuration is wrong.", message)
    assert "Snakefile" not in result.output  # whose line says nothing to the user
    assert not (workspace.path / "data").exists() and not (workspace.path / "ckpt").exists()


def test_a_dry_run_finds_what_is_wrong_in_the_environment(workspace: Workspace):
    result = workspace.snakemake("-n", environment={"SNAKETRON_STF__TRAIN_ITERS": "10"})
    refused(result, "stf: unknown key; did you mean 'sft'?")


# ------------------------------------------------------------------------------------------ raw files


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def jsonl(*rows: str) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": RANDOM}), sink)
    return sink.getvalue().to_pybytes()


TEXTS = jsonl(*(json.dumps({"text": text}) for text in RANDOM))


BAD = {  # the content of a raw file, and what is said about it
    "empty.jsonl": (b"", ": holds no documents"),
    "json.jsonl": (jsonl(*ROWS[:1000], '{"text": "a', *ROWS[1000:]), ":1001: invalid JSON ("),
    "field.jsonl": (jsonl(*ROWS[:1500], '{"body": "a"}'), ":1501: no field 'text'; the fields are 'body'"),
    "type.jsonl": (jsonl(*ROWS[:1500], '{"text": 3}'), ":1501: field 'text' is int, not text"),
    "cut_gz.jsonl.gz": (cut(gzip.compress(TEXTS, mtime=0)), "cut off or damaged here"),
    "cut_zst.jsonl.zst": (cut(zstandard.compress(TEXTS)), "cut off or damaged here"),
    "cut.parquet": (cut(parquet()), ": not a complete Parquet file"),
}


def test_each_bad_raw_file_is_named_with_its_line(copy: Workspace):
    (copy.path / "raw").mkdir()
    for name, (content, _) in BAD.items():
        (copy.path / "raw" / name).write_bytes(content)
    copy.write("raw/good.jsonl", "\n".join(ROWS))
    code = "{name: code, paths: [data/sample/code/part_0.jsonl]}"
    records = [f"data/tokens/docs/{name.partition('.')[0]}.json" for name in (*BAD, "good.jsonl")]
    corpora = f"corpora=[{{name: docs, paths: [raw]}}, {code}]"
    result = copy.snakemake("--keep-going", *records, config=(corpora,))
    assert result.jobs == {"tokenize_shard": len(records)}
    refused(result)
    errors = [line for line in result.output.splitlines() if "error: raw/" in line]
    for name, (_, message) in BAD.items():
        (shown, *_) = (line for line in errors if f"error: raw/{name}:" in line)
        assert message in shown
    there = {p.stem for p in (copy.path / "data/tokens/docs").rglob("*") if p.is_file()}
    assert there == {"part_0", "part_1", "good"} and not partials(copy)


def test_a_conversation_file_without_messages_is_named(copy: Workspace):
    copy.write("raw/a.jsonl", '{"conversation": []}\n' * 10)
    chats = "{name: questions, paths: [raw/a.jsonl]}, {name: tools, paths: [data/sample/tools/part_0.jsonl]}"
    result = copy.snakemake("data/chat/questions/a.json", config=(f"chats=[{chats}]",))
    refused(result, "raw/a.jsonl:1: no field 'messages'; the fields are 'conversation'")
    assert not list((copy.path / "data/chat/questions").glob("*a.*"))


# --------------------------------------------------------------------------- data of something else


def test_a_bin_cut_short_after_the_blend_is_named(copy: Workspace):
    line = line_for(copy, "ckpt/pretrain/broad", "seed=5")
    before = (copy.path / "ckpt/pretrain/broad").readlink()
    shard = copy.path / "data/tokens/code/train/part_0.bin"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 2)
    refused(
        run(copy, line),
        f"data/tokens/code/train/part_0.bin: {size - 2} bytes, and data/pretrain/broad/blend.json says "
        f"{size}; remove its record and run again",
    )
    assert (copy.path / "ckpt/pretrain/broad").readlink() == before and not partials(copy)


def test_shards_of_another_tokenizer_are_refused_by_the_blend_and_by_the_training(copy: Workspace):
    """Made by hand in an order that Snakemake would not have let pass."""
    training = line_for(copy, "ckpt/pretrain/broad", "seed=5")
    for name in ("blend.json", "record.json"):
        (copy.path / "data/pretrain/broad" / name).rename(copy.path / name)
    blending = line_for(copy, "data/pretrain/broad/blend.json")
    tokenizer = copy.path / "data/tokenizer/tokenizer.json"
    old = files.sha256(tokenizer)[:12]
    tokenizer.write_text(tokenizer.read_text() + "\n")
    new = files.sha256(tokenizer)[:12]
    refused(
        run(copy, blending),
        f"data/tokens/docs/part_0.json: tokenized with another tokenizer (sha256 {old}, "
        f"data/tokenizer has {new})",
    )
    left = {path.name for path in (copy.path / "data/pretrain/broad").iterdir()}
    assert left == {"index", "index.json"}
    (copy.path / "blend.json").rename(copy.path / "data/pretrain/broad/blend.json")
    refused(
        run(copy, training),
        f"data/pretrain/broad/blend.json: made with another tokenizer (sha256 {old}, and {new} is wanted)",
    )
    assert not partials(copy)


def test_a_base_checkpoint_of_another_model_is_refused(copy: Workspace):
    line = line_for(copy, "ckpt/pretrain/focused", "seed=5")
    edited = line.replace('"hidden_size":64', '"hidden_size":32')
    assert edited != line
    refused(
        run(copy, edited),
        "ckpt/pretrain/broad is a checkpoint of another model:\n"
        "model.hidden_size: 64 in the checkpoint, 32 in the configuration",
    )
    assert len(list((copy.path / "ckpt/versions").iterdir())) == 3


def test_a_base_checkpoint_with_another_tokenizer_is_refused(copy: Workspace):
    line = line_for(copy, "ckpt/sft", "seed=5")
    tokenizer = copy.path / "data/tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    refused(
        run(copy, line), "ckpt/pretrain/focused is a checkpoint of another model:\nthe tokenizer: sha256 "
    )


@pytest.mark.parametrize("what", ["tokenizer_sha256", "template_sha256", "pack_size"])
def test_packs_of_something_else_are_refused(copy: Workspace, what: str):
    line = line_for(copy, "ckpt/sft", "seed=5")
    blend = copy.path / "data/sft/blend.json"
    if what == "tokenizer_sha256":
        files.write_json(blend, files.read_json(blend) | {what: "f" * 64})
        tokenizer = copy.path / "data/tokenizer/tokenizer.json"
        message = f"was made with {what} {'f' * 64}, and {files.sha256(tokenizer)}"
    elif what == "template_sha256":
        value = files.read_json(blend)
        source = value["splits"]["train"][1]
        old, source[what] = source[what], "f" * 64
        files.write_json(blend, value)
        message = f"was made with {what} {old}, and {'f' * 64}"
    else:
        size = files.read_json(blend)["pack_size"]
        line = line.replace(f'"seq_length":{size}', '"seq_length":768')
        message = f"was made with {what} {size}, and 768"
    before = (copy.path / "ckpt/sft").readlink()
    where = "data/sft/train/tools/part_0.parquet" if what == "template_sha256" else "data/sft/blend.json"
    refused(run(copy, line), f"{where}: {message} is wanted; ")
    assert (copy.path / "ckpt/sft").readlink() == before


def test_a_pack_file_that_was_cut_is_named(copy: Workspace):
    line = line_for(copy, "ckpt/sft", "seed=5")
    path = copy.path / "data/sft/train/tools/part_0.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    refused(run(copy, line), f"data/sft/train/tools/part_0.parquet: {size - 100} bytes, and data/sft")


# ------------------------------------------------------------------------------------------ full disk


def test_tokenizing_on_a_full_disk_leaves_nothing_and_works_again(copy: Workspace):
    tokens = copy.path / "data/tokens/code"
    before = {p: p.read_bytes() for p in tokens.rglob("*.bin")}
    shutil.rmtree(tokens)
    (line,) = (x for x in shell_lines(copy, "data/tokens/code/part_0.json") if "tokenize_shard.py" in x)
    refused(
        run(copy, line, limit_kib=200),
        "error: cannot write data/tokens/code/train/part_0.bin: file too large",
    )
    assert [p for p in tokens.rglob("*") if p.is_file()] == []
    again = run(copy, line)
    assert again.status == 0, again.output
    assert {p: p.read_bytes() for p in tokens.rglob("*.bin")} == before


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_one_before_it(copy: Workspace):
    """Killed after its first checkpoint, continued on a full disk, then with room again."""
    config = "pretrain={save_interval: 2}"
    (copy.path / "ckpt").rename(copy.path / "undisturbed")
    line = line_for(copy, "ckpt/pretrain/broad", config)
    kill_forked(copy, line, saved(copy.path / "ckpt", 2))
    (version,) = (copy.path / "ckpt/versions").iterdir()
    complete = int((version / "latest_checkpointed_iteration.txt").read_text())
    result = run(copy, line, limit_kib=2000)
    directory = version.relative_to(copy.path) / f"iter_{complete + 2:07d}"
    refused(result, f"error: {directory}: the checkpoint cannot be written")
    assert int((version / "latest_checkpointed_iteration.txt").read_text()) == complete
    assert not (copy.path / "ckpt/pretrain/broad").exists() and not partials(copy)
    again = run_forked(copy, line)
    assert again.status == 0, again.output[-3000:]
    assert f"continues after step {complete}" in (version / "train.log").read_text()
    found, expected = (
        sorted((copy.path / root / "pretrain/broad").glob("iter_*/*.distcp"))[-1]
        for root in ("ckpt", "undisturbed")
    )
    assert found.parent.name == expected.parent.name and found.read_bytes() == expected.read_bytes()
