"""How fast raw text becomes a Megatron .bin/.idx pair, against datatrove and Megatron-LM; in what memory.

    python tests/benchmarks/tokenization.py [--megabytes 60] [--vocab-size 32768]
    python tests/benchmarks/tokenization.py --memory 0.1 1 10

Each program is a process of its own, on the same file of source code (this Python installation's) and the
same byte-level BPE. Seconds are those of the whole process, imports included. The ids must be equal.
On a machine that does other work as well, look at the CPU seconds and use --repeats. The first run of a
program may compile the modules that it imports, so the shortest of several counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/tokenize_shard.py"
SETTINGS = {"corpus": "code", "text_field": "text", "valid_fraction": 0.0, "test_fraction": 0.0}


@dataclass
class Run:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def measure(*command: object, **environment: str) -> Run:
    """Run a command to its end."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | environment
    process = subprocess.Popen([str(part) for part in command], env=environment, stderr=-1)
    assert process.stderr is not None
    output = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(output.decode())
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


# ------------------------------------------------------------------------------------------ what is read


def sources(num_bytes: int) -> Iterator[str]:
    """Different Python files of this installation, without those that spell a control token."""
    from snaketron.data.tokenizer import SPECIAL_TOKENS

    seen: set[str] = set()
    roots = sysconfig.get_paths()
    for root in (roots["stdlib"], roots["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text()
            except (UnicodeDecodeError, OSError):
                continue
            if not text or text in seen or any(token in text for token in SPECIAL_TOKENS):
                continue
            seen.add(text)
            yield text
            num_bytes -= len(text.encode())
            if num_bytes <= 0:
                return


def paths(directory: Path, megabytes: int, vocab_size: int) -> tuple[Path, Path]:
    return directory / f"code_{megabytes}.jsonl", directory / f"tokenizer_{vocab_size}"


def prepare(directory: Path, megabytes: int, vocab_size: int) -> tuple[Path, Path]:
    """The raw file and the tokenizer; made once."""
    from snaketron.data import tokenizer
    from snaketron.settings.tokenizer import TokenizerSettings

    directory.mkdir(parents=True, exist_ok=True)
    corpus, trained = paths(directory, megabytes, vocab_size)
    if not corpus.exists():
        rows = (json.dumps({"text": text}) + "\n" for text in sources(megabytes * 1_000_000))
        corpus.write_text("".join(rows))
    if not (trained / "record.json").exists():
        text = directory / "train.jsonl"
        read = sources(max(20_000_000, 500 * vocab_size))  # has pairs for so many entries
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in read))
        tokenizer.build(
            [text],
            settings=TokenizerSettings(vocab_size=vocab_size, text_field="text"),
            output=trained / "tokenizer.json",
            record=trained / "record.json",
        )
    return corpus, trained


# --------------------------------------------------------------------------------------------- programs


def arguments(corpus: Path, tokenizer: Path, output: Path, threads: int) -> list[str]:
    """The command line of tokenize_shard."""
    bins = [output / split / "code.bin" for split in ("train", "valid", "test")]
    options = ["--text", corpus, "--settings", json.dumps(SETTINGS), "--tokenizer", tokenizer]
    options += ["--threads", threads, "--bins", *bins, "--documents", output / "code.parquet"]
    return [str(option) for option in (*options, "--record", output / "code.json")]


def datatrove(corpus: Path, tokenizer: Path, output: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    shutil.rmtree(output, ignore_errors=True)  # it skips what it finds done
    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    writer = MegatronDocumentTokenizer(str(output), "code", str(tokenizer / "tokenizer.json"))
    LocalPipelineExecutor([reader, writer], logging_dir=str(output / "logs")).run()


def megatron(corpus: Path, tokenizer: Path, output: Path) -> None:
    """As Megatron-LM's tools/preprocess_data.py does in one process: a document at a time."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = loaded.token_to_id("<|endoftext|>")
    output.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(
        str(output / "code.bin"), dtype=DType.optimal_dtype(loaded.get_vocab_size())
    )
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            ids = [*loaded.encode(json.loads(line)["text"], add_special_tokens=False).ids, end]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(str(output / "code.idx"))


def shares(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Print where the time of tokenize_shard goes, on one thread."""
    start = time.perf_counter()
    os.environ["FASTOKENS_BPE_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
    import tokenize_shard
    from snaketron.data import encode
    from snaketron.data.text import binidx, origins, reading, tokenize
    from snaketron.lineage import record

    spent = {"imports": time.perf_counter() - start}

    def timed(holder: object, name: str, label: str) -> None:
        function = getattr(holder, name)

        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[label] = spent.get(label, 0) + time.perf_counter() - begin

        setattr(holder, name, wrapper)

    batches = reading.Reader.batches

    def timed_batches(reader):
        found = batches(reader)
        holder = types.SimpleNamespace(next=lambda: next(found, None))
        timed(holder, "next", "reading, parsing, split hashes")
        while (batch := holder.next()) is not None:
            yield batch

    reading.Reader.batches = timed_batches
    timed(reading, "split_of", "split hashes")
    timed(tokenize, "tokenizer_info", "loading the tokenizer")
    timed(encode.Encoder, "__init__", "loading the tokenizer")
    timed(encode.Encoder, "encode", "encoding and comparing")
    timed(encode.Encoder, "_compare", "comparing")
    timed(tokenize._Shard, "_write", "ends, splits, writing, sha256")
    timed(binidx.Writer, "write", "writing, sha256")
    timed(origins.Writer, "write", "table")
    timed(tokenize._Shard, "_close", "closing")
    timed(record, "_named", "record, sha256 of the input")
    tokenize_shard.main(arguments(corpus, tokenizer, output, 1))
    total = time.perf_counter() - start
    inner = {
        "split hashes": "reading, parsing, split hashes",
        "comparing": "encoding and comparing",
        "writing, sha256": "ends, splits, writing, sha256",
        "table": "ends, splits, writing, sha256",
    }
    for label in inner:
        spent[inner[label]] -= spent.get(label, 0)
    names = {
        "reading, parsing, split hashes": "reading, parsing",
        "encoding and comparing": "encoding",
        "ends, splits, writing, sha256": "ends, splits",
    }
    spent["other"] = total - sum(spent.values())
    print("\nwhere the time goes, one thread:")
    for label, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {names.get(label, label):28} {seconds:6.2f} s {seconds / total:6.1%}")


# ---------------------------------------------------------------------------------------------- tables


def compare(directory: Path, megabytes: int, vocab_size: int, repeats: int) -> None:
    """Print the time of each program, and its ratio to datatrove on as many threads."""
    from snaketron.data.tokenizer import tokenizer_info

    import numpy as np

    corpus, tokenizer = prepare(directory, megabytes, vocab_size)
    this = [sys.executable, __file__, "--directory", directory, "--megabytes", megabytes]
    this += ["--vocab-size", vocab_size, "--only"]
    programs = {
        "datatrove, 1 thread": ([*this, "datatrove"], "1"),
        "datatrove, 2 threads": ([*this, "datatrove"], "2"),
        "Megatron-LM's way, 1 process": ([*this, "megatron"], "1"),
    }
    for threads in (1, 2):
        out = directory / f"ours_{threads}"
        command = [sys.executable, SCRIPT, *arguments(corpus, tokenizer, out, threads)]
        programs[f"tokenize_shard, {threads} thread{'s' * (threads > 1)}"] = (command, str(threads))
    runs: dict[str, Run] = {}
    for name, (command, threads) in list(programs.items()) * repeats:
        parallel = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": str(threads != "1").lower()}
        run = measure(*command, **parallel)
        runs[name] = min(run, runs.get(name, run), key=lambda run: run.seconds)
    outputs = ["datatrove/code_00000_tokens.bin", "megatron/code.bin", "ours_1/train/code.bin"]
    hashes = {hashlib.sha256((directory / output).read_bytes()).hexdigest() for output in outputs}
    width = np.dtype(tokenizer_info(tokenizer).dtype).itemsize
    tokens = (directory / outputs[0]).stat().st_size // width
    size = corpus.stat().st_size / 1e6
    print(
        f"{size:.1f} MB of source code, {vocab_size:,} entries, {tokens:,} tokens, "
        f"{'equal' if len(hashes) == 1 else 'DIFFERENT'} ids"
    )
    titles = f"{'seconds':>8} {'ratio':>6} {'CPU s':>7} {'ratio':>6} {'M tokens/s':>11} {'MB/s':>6}"
    print(f"{'':30} {titles} {'peak MB':>8}")
    for name, run in runs.items():
        base = runs["datatrove, 2 threads" if "2" in name else "datatrove, 1 thread"]
        print(
            f"{name:30} {run.seconds:8.2f} {base.seconds / run.seconds:6.1f} "
            f"{run.cpu_seconds:7.2f} {base.cpu_seconds / run.cpu_seconds:6.1f} "
            f"{tokens / run.seconds / 1e6:11.2f} {size / run.seconds:6.1f} {run.peak_mb:8.0f}"
        )
    subprocess.run([*map(str, this), "shares"], check=True, stderr=subprocess.DEVNULL)


def memory(directory: Path, gigabytes: list[float], vocab_size: int, threads: int) -> None:
    """Print the peak memory for files of several sizes: the same documents again, each a little different."""
    corpus, tokenizer = prepare(directory, 60, vocab_size)
    lines = corpus.read_bytes().splitlines(keepends=True)
    print(f"{'GB':>6} {'documents':>10} {'seconds':>8} {'MB/s':>6} {'peak MB':>8}")
    for size in gigabytes:
        path = directory / "large.jsonl"
        written = copy = count = 0
        with path.open("wb") as file:
            while written < size * 1e9:
                mark = f'{{"text": "# copy {copy}\\n'.encode()
                for line in lines:
                    written += file.write(line.replace(b'{"text": "', mark, 1))
                    count += 1
                    if written >= size * 1e9:
                        break
                copy += 1
        try:
            run = measure(sys.executable, SCRIPT, *arguments(path, tokenizer, directory / "large", threads))
        finally:
            path.unlink()
        print(
            f"{written / 1e9:6.1f} {count:10,} {run.seconds:8.1f} {written / run.seconds / 1e6:6.1f} "
            f"{run.peak_mb:8.0f}",
            flush=True,
        )
        for output in (directory / "large").rglob("code.*"):
            output.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60, help="size of the raw file")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="entries of the tokenizer")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each program; the shortest counts")
    parser.add_argument("--memory", type=float, nargs="+", metavar="GB", help="files of these sizes instead")
    parser.add_argument("--threads", type=int, default=1, help="of tokenize_shard, for --memory")
    parser.add_argument(
        "--directory", type=Path, default=Path("/tmp/snaketron_tokenization"), help="where files are made"
    )
    parser.add_argument("--only", choices=["datatrove", "megatron", "shares"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "scripts"))
    if args.only:
        corpus, tokenizer = paths(args.directory, args.megabytes, args.vocab_size)
        globals()[args.only](corpus, tokenizer, args.directory / args.only)
    elif args.memory:
        memory(args.directory, args.memory, args.vocab_size, args.threads)
    else:
        compare(args.directory, args.megabytes, args.vocab_size, args.repeats)


if __name__ == "__main__":
    main()
