"""How long Snakemake takes over the graph, and what a job costs beside its work.

    python tests/benchmarks/graph.py            # a dry-run of the full recipe's shape
    python tests/benchmarks/graph.py --jobs     # a real run: overhead of a job, and of grouped shards

The recipe's shape is 30 corpora and 12 chat sources of 128 files each, and 4 phases over all corpora.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]


def workspace(path: Path) -> Path:
    """A directory in which the workflow runs as it does in a clone."""
    path.mkdir(parents=True)
    for part in ("Snakefile", "rules", "scripts", "profiles", "config", "envs"):
        (path / part).symlink_to(REPOSITORY / part)
    return path


def snakemake(path: Path, *arguments: str) -> tuple[float, str]:
    """Seconds of a run, and what it printed."""
    begin = time.monotonic()
    done = subprocess.run(
        [Path(sys.executable).parent / "snakemake", "--profile", "profiles/local", *arguments],
        cwd=path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    seconds = time.monotonic() - begin
    if done.returncode:
        sys.exit(f"snakemake failed:\n{done.stdout[-3000:]}")
    return seconds, done.stdout


def recipe(path: Path, *, corpora: int = 30, chats: int = 12, files: int = 128, phases: int = 4) -> None:
    """Empty raw files and the configuration of the full recipe's shape."""
    names = {"corpora": [f"corpus_{i}" for i in range(corpora)], "chats": [f"chat_{i}" for i in range(chats)]}
    for name in (n for group in names.values() for n in group):
        (path / "raw" / name).mkdir(parents=True)
        for i in range(files):
            (path / "raw" / name / f"part_{i:03}.jsonl").touch()
    blend = [{"corpus": name, "weight": 1.0} for name in names["corpora"]]
    config = {
        **{key: [{"name": n, "paths": [f"raw/{n}"]} for n in group] for key, group in names.items()},
        "tokenizer": {"text": ["raw/corpus_0/part_000.jsonl"]},
        "pretrain": {
            "phases": [{"name": f"phase_{i}", "tokens": 10**9, "blend": blend} for i in range(phases)]
        },
        "sft": {"blend": [{"source": name, "weight": 1.0} for name in names["chats"]]},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(config))


def dry_run(root: Path) -> None:
    path = workspace(root / "recipe")
    recipe(path)
    print("dry-run of the full recipe's shape: 30 x 128 text files, 12 x 128 chat files, 4 phases")
    print(f"{'files of a shard':>18} {'jobs':>6} {'seconds':>8}")
    for size in (None, 8):
        for i, raw in enumerate(sorted((path / "raw").rglob("*.jsonl"))):
            raw.write_bytes(b"{}" if i < 1 or size else b"")
        config = (
            [] if size is None else [f"{s}={{shard_size: {2 * size}}}" for s in ("pretrain_data", "sft_data")]
        )
        seconds, output = snakemake(
            path, "-n", "ckpt/sft", "--configfile", "recipe.yaml", *(["--config", *config] if config else [])
        )
        jobs = next(line.split()[1] for line in output.splitlines() if line.startswith("total "))
        print(f"{size or 1:>18} {jobs:>6} {seconds:>8.1f}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest process {peak:.0f} MB")


def real_run(root: Path, num_files: int, megabytes: float) -> None:
    """Tokenize a text in many small jobs and in few larger ones; the difference is what a job costs."""
    path = workspace(root / "jobs")
    source = "\n".join(p.read_text(errors="ignore") for p in sorted(Path(os.__file__).parent.glob("*.py")))
    words, draw = source.split(" "), random.Random(0)
    (path / "raw").mkdir()
    for i in range(num_files):
        with (path / "raw" / f"part_{i:03}.jsonl").open("w") as file:
            size = 0
            while size < megabytes * 1e6:
                start = draw.randrange(len(words) - 600)
                size += file.write(json.dumps({"text": " ".join(words[start : start + 600])}) + "\n")
    config = {
        "corpora": [{"name": "text", "paths": ["raw"]}],
        "tokenizer": {"text": ["raw/part_000.jsonl"], "vocab_size": 2048},
        "pretrain": {
            "phases": [{"name": "one", "tokens": 10**6, "blend": [{"corpus": "text", "weight": 1}]}]
        },
    }
    (path / "jobs.yaml").write_text(yaml.safe_dump(config))
    snakemake(path, "data/tokenizer/record.json", "--configfile", "jobs.yaml")
    print(f"the same {num_files} files of {megabytes:g} MB as many jobs and as few, one at a time")
    print(f"{'jobs':>6} {'seconds':>8}")
    taken: dict[int, float] = {}
    for together in (1, 8, num_files // 2):
        size = f"pretrain_data={{shard_size: {int(together * megabytes * 1e6)}}}"
        seconds, _ = snakemake(
            path,
            "data/pretrain/one/blend.json",
            "--configfile",
            "jobs.yaml",
            "--config",
            size,
            "--cores",
            "1",
        )
        jobs = len(list((path / "data/tokens/text").glob("*.json")))
        taken[jobs] = seconds
        print(f"{jobs:>6} {seconds:>8.1f}")
        for made in (path / "data/tokens", path / "data/pretrain"):
            subprocess.run(["rm", "-r", made], check=True)
    # Two runs of the same work differ in the number of jobs alone.
    most, fewest = max(taken), min(taken)
    overhead = (taken[most] - taken[fewest]) / (most - fewest)
    work = (taken[fewest] - fewest * overhead) / num_files
    print(f"a job costs {overhead:.2f} s beside its work; a file of {megabytes:g} MB takes {work:.2f} s")
    print(f"overhead is 5 % of the work from shards of {20 * overhead * megabytes / work:,.0f} MB on")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", action="store_true", help="measure the overhead of real jobs")
    parser.add_argument("--files", type=int, default=32)
    parser.add_argument("--megabytes", type=float, default=40.0, help="size of a file of the real run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.jobs:
            real_run(Path(directory), options.files, options.megabytes)
        else:
            dry_run(Path(directory))
