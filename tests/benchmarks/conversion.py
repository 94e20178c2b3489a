"""Bytes a second and peak memory of an export and an import, beside a plain copy.

    python tests/benchmarks/conversion.py [--gb 2] [--directory DIR]

A checkpoint in bf16 is made of random numbers; its largest tensor has the experts of a layer. It is exported,
what was exported is imported, and cp copies the export. Both conversions hash or verify what they write.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from snaketron.config import Model
from snaketron.huggingface import torch_dist
from snaketron.huggingface.load import published_weights
from snaketron.huggingface.names import VOCABULARY, megatron_tensors, tensors
from snaketron.huggingface.save import Checkpoint, export
from snaketron.lineage.record import Entry

import psutil
import torch

TOKENS = 32_000


def model(gb: float) -> Model:
    """A model of about so many GB: a layer of experts has 0.2 GB."""
    return Model(
        hybrid_layer_pattern="ME" * max(1, round(gb / 0.24)),
        hidden_size=1024,
        mamba_num_heads=32,
        mamba_head_dim=64,
        num_moe_experts=128,
        moe_latent_size=512,
        moe_ffn_hidden_size=768,
        moe_shared_expert_intermediate_size=2048,
        mtp_num_layers=0,
        precision="bf16",
    )


def write(directory: Path, model: Model) -> None:
    def chunk(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch_dist.Chunk:
        return torch_dist.Chunk(key, shape, dtype, None, lambda: torch.randn(shape, dtype=dtype))

    directory.mkdir(parents=True)
    found = megatron_tensors(tensors(model, TOKENS), dict.fromkeys(VOCABULARY, TOKENS))
    wanted = {one.key: (one.shape, torch.float32 if one.fp32 else torch.bfloat16) for one in found}
    torch_dist.write(directory, [chunk(key, *of) for key, of in wanted.items()], {"iteration": 1})


def measure(name: str, size: int, act: Callable[[], object]) -> None:
    """Do something, and print its bytes a second and by how much the memory of this process grew.

    Pages of files that are mapped, which the system takes back when it needs them, are not counted.
    """
    process, done = psutil.Process(), threading.Event()

    def own() -> int:
        found = process.memory_info()
        return int(found.rss - found.shared)

    before, peak = own(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, busy = time.perf_counter(), time.process_time()
    act()
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    done.set()
    watcher.join()
    grown = max(0, peak[0] - before)
    print(
        f"{name}: {size / seconds / 1e6:,.0f} MB/s, {cpu:.1f} s of CPU time, {grown / 1e9:.2f} GB more memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--directory", type=Path, help="where to write, several times the size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as made:
        root, of = Path(made), model(args.gb)
        write(root / "ckpt", of)
        size = sum(path.stat().st_size for path in (root / "ckpt").iterdir())
        print(f"{size / 1e9:.2f} GB")
        checkpoint = Checkpoint(
            tensors=root / "ckpt",
            tokenizer=root,
            model=of,
            seq_length=4096,
            vocab_size=TOKENS,
            eos_token_ids=[0],
            pad_token_id=1,
        )
        source = Entry("checkpoint", "ckpt", version="one")
        measure("export", size, lambda: export(checkpoint, root / "hf", source=source, card=""))
        (root / "again").mkdir()
        weights = published_weights(root / "hf", of, TOKENS)
        measure("import", size, lambda: torch_dist.write(root / "again", weights.chunks, {}))
        measure("cp", size, lambda: subprocess.run(["cp", "-r", root / "hf", root / "copy"], check=True))


if __name__ == "__main__":
    main()
