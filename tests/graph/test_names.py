"""Names of files, roots and values reach the programs as they are: no shell reads them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from snaketron.sources.pairs import MAX_SHARDS
from tests.conftest import REPOSITORY, Workspace, make_workspace

import pyarrow.parquet as pq
import yaml

RUN = "$(touch INJECTED) `touch INJECTED`"  # what a shell would do, between double quotes too
ROOT = f"my\\; {RUN} 'q\" [1]* & <x c::d -n "
HOSTILE = [
    *("data[1].jsonl", "data1.jsonl", "data*.jsonl", "x$(touch INJECTED).jsonl", "`touch INJECTED`.jsonl"),
    *("a b.jsonl", " a.jsonl", "it's.jsonl", 'say "hi".jsonl', "back\\slash\\.jsonl", "-x.jsonl"),
    *("y;touch INJECTED;.jsonl", "z&touch INJECTED&.jsonl", "v|touch INJECTED.jsonl", "$HOME.jsonl"),
    *("w>INJECTED.jsonl", "f<g.jsonl", "~h.jsonl", "#i.jsonl", "!!j.jsonl", "--k.jsonl", "naïve.jsonl"),
    *("100%s.jsonl", "c::d.jsonl"),
]


def test_every_placeholder_of_every_command_is_quoted():
    rules = [REPOSITORY / "Snakefile", *(REPOSITORY / "rules").glob("*.smk")]
    text = "".join(path.read_text() for path in rules)
    commands = re.findall(r"^    shell:\n((?: {8}.*\n)+)", text, re.MULTILINE)
    assert len(commands) == text.count("shell:") > 20
    assert not re.search(r"^    (run|script|wrapper|notebook):", text, re.MULTILINE)
    placeholders = re.findall(r"\{[^{}]*\}", "".join(commands))
    assert [p for p in placeholders if not p.endswith(":q}")] == []


def test_a_program_may_be_told_all_shards_that_megatron_core_takes(workspace: Workspace):
    """Linux has room for 2 MiB of arguments where the stack has its usual limit, and 4 MB are given here."""
    planned = workspace.snakemake("-n", "-p", "ckpt/pretrain/broad").output
    command = re.search(r"ulimit .*blend_pretrain\.py .*/broad/.*", planned)
    assert command
    records = " ".join(f"{'x' * 110}/{number:05d}.json" for number in range(MAX_SHARDS))
    told = re.sub(r"--records .* --tokenizer", f"--records {records} --tokenizer", command[0])
    workspace.write("told.sh", told)
    assert "data/tokenizer/tokenizer.json: no such file" in workspace.run("bash", "told.sh").output


def plain(name: str) -> str:
    """A harmless name of the same shard."""
    return re.sub(r"[^a-z0-9_.]", "_", name.removesuffix(".jsonl").lower()) + ".jsonl"


def words(number: int) -> str:
    """Text unlike that of any other number."""
    digits = "".join(hashlib.sha256(f"{number}/{i}".encode()).hexdigest() for i in range(8))
    return " ".join(digits[i : i + 8] for i in range(0, len(digits), 8))


def named(path: Path, names: list[str], *, chats: str, root: str, field: str, config_name: str) -> Workspace:
    """A workspace with files of these names; what is in a file follows from its place in `names` alone."""
    workspace = make_workspace(path)
    for number, name in enumerate(names):
        workspace.write(name, json.dumps({field: words(number)}) + "\n")
        question = {"role": "user", "content": f"What is {number} squared?"}
        answer = {"role": "assistant", "content": f"It is {number * number}."}
        workspace.write(f"{chats}/{name}", json.dumps({"messages": [question, answer]}) + "\n")
    config: dict[str, Any] = {
        "pathvars": {
            "data": f"{root}data",
            "ckpt": f"{root}ckpt",
            "logs": f"{root}logs",
            "benchmarks": f"{root}benchmarks",
        },
        "tokenizer": {"text": names[:9], "text_field": field, "vocab_size": 300},
        "corpora": [{"name": "docs", "paths": names, "text_field": field}],
        "pretrain_data": {"shard_size": 10**9, "valid_fraction": 0.1, "test_fraction": 0.1},
        "pretrain": {"phases": [{"name": "one", "tokens": 512, "blend": [{"corpus": "docs", "weight": 1}]}]}
        | {"seq_length": 64, "global_batch_size": 4, "warmup_tokens": 128, "decay_tokens": 128}
        | {"cpus_per_task": 1, "eval_samples": 4},
        "chats": [{"name": "help", "paths": [chats]}],
        "sft_data": {"shard_size": 10**9, "pack_size": 256},
        "sft": {"blend": [{"source": "help", "weight": 1}]},
    }
    workspace.write(config_name, yaml.safe_dump(config))
    return Workspace(path, (config_name,))


def targets(root: str) -> list[str]:
    """The data of both trainings."""
    return [f"{root}data/{name}/blend.json" for name in ("pretrain/one", "sft")]


def hostile(path: Path, config_name: str = f"{ROOT}config.yaml") -> Workspace:
    return named(
        *(path, HOSTILE),
        chats=f"my {RUN} 'chats'",
        root=ROOT,
        field=f"-{RUN} 'text\"",
        config_name=config_name,
    )


def harmless(path: Path) -> Workspace:
    names = [plain(name) for name in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    return named(path, names, chats="chats", root="", field="text", config_name="config.yaml")


def equal(found: Path, expected: Path) -> None:
    """Assert that both directories hold the same files; bytes are compared where no file names are inside."""
    outputs = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert {path.relative_to(found) for path in found.rglob("*") if path.is_file()} == outputs
    same = [path for path in outputs if path.suffix in (".bin", ".idx")]
    assert len(same) == 6  # of each split
    for path in [*same, Path("tokenizer/tokenizer.json")]:
        assert (found / path).read_bytes() == (expected / path).read_bytes(), path
    for path in [path for path in outputs if path.suffix == ".parquet"]:
        kept = [name for name in pq.read_schema(expected / path).names if name != "file"]
        assert pq.read_table(found / path, columns=kept).equals(pq.read_table(expected / path, columns=kept))


def test_hostile_names_make_the_same_bytes_as_plain_ones_and_are_trained_on(tmp_path: Path):
    for workspace, root in ((harmless(tmp_path / "plain"), ""), (hostile(tmp_path / "hostile"), ROOT)):
        result = workspace.snakemake(*targets(root))
        assert result.status == 0, result.output[-5000:]
    equal(tmp_path / f"hostile/{ROOT}data", tmp_path / "plain/data")
    result = workspace.snakemake(f"{ROOT}ckpt/pretrain/one")
    assert result.status == 0, result.output[-5000:]
    trained = workspace.path / f"{ROOT}ckpt/pretrain/one"
    assert (trained / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not list(tmp_path.rglob("INJECTED"))
