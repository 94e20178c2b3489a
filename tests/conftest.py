"""A copy of the workflow to run in, and one finished run of the main job that the tests share."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.log import PLAIN
from tests import warm
from tests.warm import Warm

import pytest
from execnet.xspec import XSpec
from xdist.scheduler import LoadScopeScheduling

REPOSITORY = Path(__file__).parent.parent
gc.disable()  # until all tests are collected: importing what they test takes 0.9 s less of 8.5
# Else some 700 processes would each compile this package anew, and others that `uv sync` has not compiled.
sys.dont_write_bytecode = False
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
# What a person's terminal, or a Slurm job that the tests run in, would change in what programs print and do.
for name in [*os.environ]:
    of_terminal = name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", PLAIN)
    if of_terminal or name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_")):
        del os.environ[name]
# Tests that share a run of the workflow, a cluster or a process that they fork from, which each worker of
# pytest would make for itself, and in which order. Stories on a cluster mostly wait: four clusters at a time
# would leave the processors idle. So two begin, one of which first needs the finished workflow, beside groups
# that compute meanwhile. What takes longest is before the rest, so that no worker is alone at the end.
TOGETHER = {
    "cluster": ("tests/slurm/",),
    "cluster for faults of its own": ("tests/slurm/test_cluster_faults.py",),
    "curation": ("tests/end_to_end/test_curation.py",),
    # They fork from one process with megatron-core. Those that need no finished workflow are first.
    "layouts": (
        "tests/unit/model/megatron/test_optimizer_state.py",
        "tests/unit/train/test_lora.py",
        "tests/unit/sizes/test_parameters.py",
        "tests/end_to_end/test_layouts.py",
        "tests/end_to_end/test_phases.py",
    ),
    "cluster without accounting": ("tests/slurm/test_without_accounting.py",),
    "cluster for faults": ("tests/slurm/test_faults.py",),
    "adapters": ("tests/end_to_end/test_lora.py",),
    "killed pretraining": (
        "tests/end_to_end/test_kill.py::test_a_killed_pretraining",
        "tests/end_to_end/test_kill.py::test_killed_while",
        "tests/end_to_end/test_kill.py::test_ctrl_c",
    ),
    "main job": ("tests/end_to_end/test_main_job.py",),
    "killed data": ("tests/end_to_end/test_kill.py::test_killed_data_rules",),
    # They read tokens with megatron-core, which nothing else of `-m quick` imports.
    "tokens": (
        "tests/unit/data/text/test_tokenize.py",
        "tests/unit/data/text/test_tokenize_documents.py",
        "tests/unit/data/test_encode.py",
    ),
}
PLACES = {place: name for name, places in TOGETHER.items() for place in places}
ORDER = (
    *(*PLACES, "tests/graph/test_registered.py", "tests/graph/test_names.py"),
    # They mostly wait.
    "tests/unit/jobs/test_supervisor.py",
    "tests/unit/tracking/test_wandb.py",
    *("tests/end_to_end/", "tests/unit/train/", "tests/unit/model/", "tests/"),
)
LAST = "tests/graph/"  # of which those that wait for the finished workflow are short, but for the two above
# What `-m quick` leaves out: what trains, what imports megatron-core, what waits for processes to hang, and
# what takes longest of the rest.
SLOW = (
    *("tests/slurm/", "tests/gpu/", "tests/unit/model/", "tests/unit/train/", "tests/unit/inference/"),
    *(
        "tests/unit/huggingface/",
        "tests/unit/sizes/",
        "tests/end_to_end/",
        "tests/unit/jobs/test_supervisor.py",
    ),
    *("tests/unit/data/sample/", "tests/unit/data/curation/test_duplicates.py", "tests/graph/test_names.py"),
    *(
        "tests/unit/report/test_figures.py",
        "tests/unit/report/test_report.py",
        "tests/unit/report/test_view.py",
        "tests/unit/tracking/test_wandb.py",
    ),
    "tests/graph/test_entry.py::test_snakemake_runs_without_an_activated_environment",
    *("tests/unit/data/curation/test_curate.py", "tests/graph/test_changed_files.py"),
    "tests/graph/test_registered.py",
    "tests/graph/test_held_out.py",
    "tests/unit/data/text/test_index.py",
    "tests/unit/tracking/test_warnings.py::"
    "test_a_continued_training_has_the_same_warnings_but_those_about_time_are_apart",
    "tests/unit/data/curation/test_filters.py::test_remembered_words_are_the_same_words",
    "tests/unit/sources/test_listing.py::test_the_command_lists_what_the_merged_configuration_asks_for",
    "tests/unit/test_examples.py",
)
BUT = "tests/end_to_end/test_main_job.py"  # the workflow from raw text to its end, once
BUT_NOT = (
    "test_every_printed_command_runs_by_itself",
    "test_a_prompt_from_standard_input_is_answered",
    "test_the_reports_reach_the_report_of_snakemake",
    "test_an_average_and_its_evaluation_are_made_by_rules_and_go_on_where_they_were_killed",
)
SNAKEMAKE, MEGATRON, PYTEST = Warm("snakemake"), Warm("megatron"), Warm("pytest")
POLLING = str(REPOSITORY / "tests/slurm/poll_often.py")  # a `snakemake`, too
PARTS = ("Snakefile", "rules", "scripts", "profiles", "config", "tests", "envs")


def is_quick(place: str) -> bool:
    """Whether a file, or a test of it, is part of `pytest -m quick`."""
    return (place.startswith(BUT) and not place.endswith(BUT_NOT)) or not place.startswith(SLOW)


def is_there(place: str) -> bool:
    """Whether there is such a directory, file, or test of a file whose name begins so."""
    file, _, name = place.partition("::")
    path = REPOSITORY / file
    return path.exists() and (not name or f"def {name}" in path.read_text())


def pytest_configure() -> None:
    """Refuse a place that is not there any more: `-m quick` would run the test by its new name."""
    places = (*ORDER, *SLOW, *(f"{BUT}::{name}" for name in BUT_NOT))
    if gone := [place for place in places if not is_there(place)]:
        raise pytest.UsageError(f"tests/conftest.py names what is not there: {', '.join(gone)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not even import what `-m quick` leaves out, nor the conftest.py of a directory that it leaves out."""
    if config.option.markexpr != "quick":
        return None
    place = str(collection_path.relative_to(REPOSITORY)) + "/" * collection_path.is_dir()
    return None if is_quick(place) or BUT.startswith(place) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick, and put the longest first."""
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker("quick")
    items.sort(key=rank)


def place_of(nodeid: str) -> str:
    """What `ORDER` says of a test: the longest beginning of its name that is there."""
    return max((place for place in ORDER if nodeid.startswith(place)), key=len)


def rank(item: pytest.Item) -> tuple[bool, int]:
    place = place_of(item.nodeid)
    short = place == "tests/" and item.nodeid.startswith(LAST)
    return short and "finished" in item.fixturenames, ORDER.index(place)  # type: ignore[attr-defined]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many tests at a time, also on two cores.

    Six, because those on a cluster mostly wait, and three clusters run at a time. For `-m quick` three,
    because the workflow takes most of its time, and more would only slow that down.
    """
    return 3 if config.option.markexpr == "quick" else 6


def pytest_xdist_setupnodes(config: pytest.Config, specs: list[XSpec]) -> None:
    """Fork the processes of pytest from one that has imported what the tests import, and share the others."""
    SNAKEMAKE.serve()
    MEGATRON.serve()
    if not Path(
        "/dev/nvidiactl"
    ).exists():  # a process that is forked cannot use CUDA where the first one did
        PYTEST.serve(*config.invocation_params.args)
        for spec in specs:
            spec.python = shlex.join([sys.executable, "-P", warm.__file__, "join"])


@pytest.hookimpl(trylast=True)  # after the processes of pytest
def pytest_sessionfinish() -> None:
    for program in (PYTEST, SNAKEMAKE, MEGATRON):
        program.stop()


def pytest_collection_finish() -> None:
    """Leave what is imported out of collections: megatron-core collects twice a save, in 0.4 s each."""
    gc.freeze()
    gc.enable()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Does what --dist loadgroup would do, if pytest 9.2 saw its groups."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            # A file of unit tests stays together: what it makes or reads once, each worker would. The list of
            # lm-eval's tasks takes 11 s.
            alone = nodeid.partition("::")[0] if nodeid.startswith("tests/unit/") else nodeid
            return PLACES.get(place_of(nodeid), alone)

    return Scheduling(config, log)


@dataclass
class Result:
    """What a command did."""

    status: int
    output: str

    @property
    def jobs(self) -> dict[str, int]:
        """How many jobs of each rule Snakemake's table has."""
        found = re.findall(r"^([a-z_]+) +(\d+)$", self.output, re.MULTILINE)
        return {name: int(count) for name, count in found if name != "total"}


def run_module(module: str, *arguments: str, processes: int = 1) -> Result:
    """A program of the tests, in one process or in several, as torchrun would start them; it must succeed."""
    shared = os.environ | {"OMP_NUM_THREADS": "1"}
    environments = [shared]
    if processes > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        environments = [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]
    statuses, output = MEGATRON.run(["-m", module, *arguments], REPOSITORY, environments, 900)
    assert not any(statuses), output[-3000:]
    return Result(0, output)


def free_port() -> int:
    """A port below those that Linux gives to connections, one of which could take it before it is used."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass
class Workspace:
    """A working directory in which the workflow runs as it does in a clone."""

    path: Path
    overlays: tuple[str, ...] = ("tests/config/micro.yaml",)

    def run(self, *command: str, environment: dict[str, str] | None = None, timeout: int = 1800) -> Result:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {})
        if command[0] in ("snakemake", POLLING):
            (status,), output = SNAKEMAKE.run([*command], self.path, [environment], timeout)
            return Result(status, output)
        done = subprocess.run(
            command,
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout)

    def command(self, *arguments: str, config: tuple[str, ...] = ()) -> list[str]:
        command = ["snakemake", "--profile", "profiles/local", *arguments, "--configfile", *self.overlays]
        return [*command, "--config", *config] if config else command

    def snakemake(self, *arguments: str, config: tuple[str, ...] = (), **options) -> Result:
        return self.run(*self.command(*arguments, config=config), **options)

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def make_workspace(path: Path) -> Workspace:
    path.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        (path / part).unlink(missing_ok=True)
        (path / part).symlink_to(REPOSITORY / part)
    return Workspace(path)


def copy_of(workspace: Workspace, path: Path) -> Workspace:
    """A copy of a finished run, times included, to change.

    The tensors of checkpoints, 140 MB of 170, are the same files: nobody writes into one that is there.
    """

    def copy_or_link(source: str, target: str) -> None:
        (os.link if source.endswith(".distcp") else shutil.copy2)(source, target)

    shutil.copytree(workspace.path, path, symlinks=True, copy_function=copy_or_link)
    return Workspace(path, workspace.overlays)


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is removed after all tests, and not after its own as that of pytest.

    To make a file, ext4 steps over each one that was removed in the minutes before. Copying the finished run
    took up to 0.4 s of CPU beside tests that removed theirs; it takes 0.04 s.
    """
    return tmp_path_factory.mktemp(re.sub(r"\W", "_", request.node.name)[:30])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty working directory."""
    return make_workspace(tmp_path / "work")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Workspace]) -> Path:
    """The directory of what `make` makes of the main job, once for all test processes, whichever comes first.

    What Snakemake printed is its `transcript.txt`.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the processes share
    path = root / name / "work"
    with files.owned(root / f"{name}.lock"):
        if not (path / "transcript.txt").exists():
            result = make(path).snakemake("ckpt/sft")
            assert result.status == 0, result.output[-5000:]
            (path / "transcript.txt").write_text(result.output)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The main job, run once to its end. Tests work on copies."""
    return Workspace(made_once(tmp_path_factory, "finished", make_workspace))


@pytest.fixture
def copy(finished: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the finished run, times included, to change."""
    return copy_of(finished, tmp_path / "work")
