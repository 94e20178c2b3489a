"""Trainings by Snaketron's own program, scripts/pretrain.py, on tokens that are made here.

For benchmarks on a machine that has no data: random tokens, or those of a text (`shapes.text_tokens`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config import Config, Parallel, load
from snaketron.data.text import binidx
from snaketron.data.text.blend import BlendedSplit, PretrainBlend, Shard, weigh
from snaketron.jobs.lines import read_metrics
from snaketron.jobs.version import Version
from snaketron.settings.blends import PhaseSettings
from snaketron.settings.training import IndexSettings, run_settings, train_settings
from snaketron.sizes.epochs import resized
from snaketron.sizes.gpus import GPUS
from snaketron.sizes.memory import activation_memory, static_memory
from snaketron.sizes.recording import work
from snaketron.sizes.step import step_time

import numpy as np
from tests.benchmarks.shapes import VOCABULARY, text_tokens
from tests.benchmarks.turns import kill

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS = 3_000_000  # of a corpus; Python's standard library has 3.4 million
DOCUMENT = 5_000  # tokens


@dataclass(frozen=True)
class Training:
    """A pretraining with a constant learning rate. Those with one `place` go on from each other."""

    name: str
    model: dict[str, Any]
    parallel: dict[str, int]
    length: int
    batch: int
    steps: int
    micro_batch_size: int = 1
    corpora: tuple[str, ...] = ("random",)  # and `text`, each with the same weight
    vocabulary: int = VOCABULARY
    optimizer: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    stop_after: int = 0  # steps after which it is ended: a checkpoint of 30 B parameters has 316 GB
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return Parallel(**self.parallel).world_size

    def config(self, gpus_per_node: int = 0, gpu: str | None = None) -> Config:
        step = self.batch * self.length
        # The rate falls in a phase that is never trained: a longer training begins like a shorter one.
        phases = [("one", self.steps * step), ("rest", 1000 * step)]
        blend = [{"corpus": "docs", "weight": 1}]
        run = {"seq_length": self.length, "global_batch_size": self.batch, "log_interval": 1}
        run |= {"micro_batch_size": self.micro_batch_size, "parallel": self.parallel}
        run |= {
            "warmup_tokens": 0,
            "decay_tokens": step,
            "eval_samples": self.batch,
            "optimizer": self.optimizer,
        }
        run["phases"] = [{"name": name, "tokens": tokens, "blend": blend} for name, tokens in phases]
        values = {"model": self.model, "pretrain": {"cpus_per_task": 4} | run | self.run}
        values |= {"cluster": {"gpus_per_node": gpus_per_node, "gpu": gpu}}
        values |= {"tokenizer": {"vocab_size": self.vocabulary}}
        return load(values, {})

    @property
    def corpus(self) -> str:
        """The directory of its data."""
        return "_".join([*self.corpora, str(self.vocabulary)])

    @property
    def samples(self) -> str:
        """Length and number of its samples: what a blend and an index are named by."""
        return f"{self.length}_{self.batch * self.steps}"


# ---------------------------------------------------------------------------------------------------- data


def prepare(root: Path, trainings: list[Training]) -> None:
    """Write the data of all trainings below `root`; what is there is taken as it is."""
    asked = []
    for training in trainings:
        data, one = root / training.corpus, (training.corpus, training.samples)
        if not data.exists():
            _write_corpora(data, training)
        if one not in asked and not (data / f"index_{training.samples}").exists():
            asked.append(one)
    if asked:  # without a GPU the import takes a quarter of the time
        command = [sys.executable, "-m", "tests.benchmarks.trainings", str(root), json.dumps(asked)]
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=REPOSITORY, env=hidden, check=True, stdout=subprocess.DEVNULL)


def _tokens(corpus: str, vocabulary: int) -> np.ndarray:
    if corpus == "text":
        return np.array(text_tokens(TOKENS)) % vocabulary
    # Half of the tokens are one of few, so that there is something to learn.
    tokens = np.random.default_rng(0).integers(0, vocabulary, TOKENS)
    return np.where(tokens % 2 == 0, tokens, tokens % 97)


def _write_corpora(data: Path, training: Training) -> None:
    with files.writing_directory(data) as made:
        (made / "tokenizer").mkdir()
        vocabulary = {str(number): number for number in range(training.vocabulary)}
        files.write_json(made / "tokenizer/tokenizer.json", {"model": {"vocab": vocabulary}})
        files.write_json(made / "tokenizer/tokenizer_config.json", {"eos_token": "0"})
        shards = []
        for corpus in training.corpora:
            paths = binidx.paths(made / corpus)
            writer = binidx.Writer(*paths, np.dtype(np.int32), made / corpus)
            writer.write(_tokens(corpus, training.vocabulary), np.full(TOKENS // DOCUMENT, DOCUMENT))
            hashes, sizes = writer.close(), [path.stat().st_size for path in paths]
            held = (TOKENS // DOCUMENT, TOKENS, sizes[0], hashes[0], sizes[1], hashes[1])
            shards.append(Shard(str((data / corpus).resolve()), corpus, *held))
        weights = dict.fromkeys(training.corpora, 1.0)
        phase = PhaseSettings(phase="one", weights=weights, train_tokens=len(shards) * TOKENS)
        train = weigh("train", phase, shards)
        empty = BlendedSplit([], [], 0, 0, [], [])
        identity = files.sha256(made / "tokenizer/tokenizer.json")
        blend = PretrainBlend("one", identity, "int32", train.tokens, train, empty, empty)
        (made / "blend.json").write_bytes(files.to_json(asdict(blend)))


def _build_indices(root: Path, asked: list[tuple[str, str]]) -> None:
    from snaketron.data.text import index

    for corpus, name in asked:
        length, samples = map(int, name.split("_"))
        data = root / corpus
        # As a longer phase has it: a training goes on from a shorter one of the same blend.
        blend = resized(files.read_json(data / "blend.json"), length * samples)
        (data / f"blend_{name}.json").write_bytes(files.to_json(blend))
        index.build(
            data / f"blend_{name}.json",
            IndexSettings(seed=load({}, {}).seed, seq_length=length, train_samples=samples),
            output=data / f"index_{name}",
            record=data / f"index_{name}.json",
        )


# ---------------------------------------------------------------------------------------------- trainings


def command(root: Path, training: Training, gpus_per_node: int) -> list[str]:
    """What trains it, as rule pretrain would."""
    config, data = training.config(gpus_per_node), root / training.corpus
    settings, run = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    options = {
        "blend": data / f"blend_{training.samples}.json",
        "index": data / f"index_{training.samples}",
        "tokenizer": data / "tokenizer",
        "settings": json.dumps(settings.model_dump(mode="json")),
        "run-settings": json.dumps(run.model_dump(mode="json")),
        "output": _output(root, training),
        "log-file": root / f"{training.name}.log",
    }
    given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    return [sys.executable, str(REPOSITORY / "scripts/pretrain.py"), *given]


def _output(root: Path, training: Training) -> Path:
    return root / (training.place or training.name) / "ckpt/pretrain/one"


def start(root: Path, training: Training, gpus_per_node: int) -> subprocess.Popen[bytes]:
    log = root / f"{training.name}.out"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            command(root, training, gpus_per_node),
            cwd=REPOSITORY,
            env=os.environ | training.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def end(
    process: subprocess.Popen[bytes], limit: float, enough: Callable[[], bool] = lambda: False
) -> int | None:
    """The exit status, 0 where it was ended because there is `enough`; None where it took too long.

    Args:
        process: a training's command, or another.
        limit: seconds after which it is killed, with all of its processes.
        enough: asked twice a second.
    """
    deadline, done = time.monotonic() + limit, False
    while process.poll() is None and time.monotonic() < deadline and not (done := enough()):
        time.sleep(0.5)
    if process.returncode is not None:
        return process.returncode
    kill(process)
    return 0 if done else None


def version(root: Path, training: Training) -> Version:
    """Where it trains: the newest version of its place."""
    versions = (_output(root, training).parent.parent / "versions").glob("[!.]*")
    return Version(max(versions, key=lambda path: path.stat().st_mtime, default=root / "nothing"))


def train(root: Path, training: Training, gpus_per_node: int, limit: float) -> dict[str, Any]:
    """Train it, and what its metrics say; `failed` says why there are none."""
    began = time.monotonic()
    process = start(root, training, gpus_per_node)
    status = end(process, limit, lambda: _is_measured(root, training))
    found: dict[str, Any] = {"name": training.name, "gpus": training.gpus}
    found["wall_s"] = round(time.monotonic() - began, 1)
    if status != 0:
        said = (root / f"{training.name}.out").read_text(errors="replace")[-1500:]
        reason = f"took longer than {limit:.0f} s" if status is None else f"status {status}"
        return found | {"failed": f"{reason}: {said}"}
    here = version(root, training)
    found["went_on_from"] = files.read_json(here.origin)["iteration"] if here.origin.exists() else 0
    return found | summary(training, read_metrics(here.metrics)[0])


def _is_measured(root: Path, training: Training) -> bool:
    lines = read_metrics(version(root, training).metrics)[0] if training.stop_after else []
    return bool(lines) and sum("loss" in line for line in lines) >= training.stop_after


def summary(training: Training, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, gradient norms, speed and memory of a training, from its lines of metrics.

    The speed is that of the median of the last six steps; the memory that of the process that writes the
    metrics, which is of the last pipeline stage.
    """
    steps = [line for line in lines if "loss" in line]
    last = [line["timing"] for line in steps[-6:]]
    seconds = statistics.median(timing["step_seconds"] for timing in last)
    return {
        "losses": [line["loss"] for line in steps],
        "norms": [line["grad_norm"] for line in steps],
        "step_s": seconds,
        "first_step_s": steps[0]["timing"]["step_seconds"],
        "tokens_per_second": training.batch * training.length / seconds / training.gpus,
        "tflops": statistics.median(timing["tflops_per_process"] for timing in last),
        "stall_s": [t for line in steps if (t := line["timing"]["checkpoint_seconds"])],
        "peak_gib": max(line["timing"]["peak_memory_gib"] for line in steps),
        "by_corpus": steps[-1].get("sources", {}),
        "fullest_expert": steps[-1].get("experts", {}).get("most"),
        **estimates(training),
    }


def estimates(training: Training, gpu: str = "h200") -> dict[str, float]:
    """What `sizes` says of the step, and of the memory of the last pipeline stage and of the fullest one."""
    config = training.config(gpu=gpu)  # with its memory: layers are recorded where that has room
    does = work(config, config.training("pretrain/one"))
    both = zip(static_memory(does), activation_memory(does), strict=True)
    memory = [kept.total + peak for kept, peak in both]
    return {
        "estimated_step_s": step_time(does, GPUS[gpu]).total,
        "estimated_gib": memory[-1] / 2**30,
        "fullest_gib": max(memory) / 2**30,
    }


if __name__ == "__main__":
    _build_indices(Path(sys.argv[1]), json.loads(sys.argv[2]))
