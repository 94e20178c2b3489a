"""The image that the processes of a training run in."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import Cluster
from snaketron.jobs.containers import containerized

import pytest


@pytest.mark.parametrize(
    ("cluster", "options", "command"),
    [
        ({}, [], ["python3", "scripts/sft.py", "--x"]),
        (
            {"container": "a.sif", "mounts": ["/0"], "gpus_per_node": 8},
            [],
            "apptainer exec --nv --bind=/0 --bind={here} --pwd={here} a.sif python scripts/sft.py --x",
        ),
        (
            {"container": "a.sqsh", "container_runtime": "pyxis", "mounts": ["/0", "/a:{here}/b"]},
            [
                "--container-image=a.sqsh",
                "--container-mounts=/0:/0,{here}:{here},/a:{here}/b",
                "--container-workdir={here}",
            ],
            "python scripts/sft.py --x",
        ),
        (
            {"container": "a.image", "container_runtime": "charliecloud", "mounts": ["/0"]},
            [],
            "ch-run --set-env --bind=/0 --bind={here} --cd={here} a.image -- python scripts/sft.py --x",
        ),
    ],
)
def test_a_container_is_put_around_the_processes_and_not_around_srun(cluster, options, command):
    here = str(Path.cwd())
    words = command.format(here=here).split() if isinstance(command, str) else command
    cluster |= {"mounts": [mount.format(here=here) for mount in cluster.get("mounts", [])]}
    found = containerized(["python3", "scripts/sft.py", "--x"], Cluster(**cluster))
    assert found == ([option.format(here=here) for option in options], words)
