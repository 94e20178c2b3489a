"""The image that the processes of a training run in: their command, and options of srun, for each runtime."""

from __future__ import annotations

import getpass
from pathlib import Path

from snaketron.config import Cluster
from snaketron.config.containers import mount


def containerized(command: list[str], cluster: Cluster) -> tuple[list[str], list[str]]:
    """Options of srun, and the command, that run `command` in the image of the configuration.

    No variable of the environment is on the command line, because some hold secrets: each runtime hands on
    the environment that it is started with.
    """
    if cluster.container is None:
        return [], command
    inside = ["python", *command[1:]]  # the image has a Python of its own
    here = str(Path.cwd())
    # A directory comes before what is mounted inside it.
    mounts = sorted([here, *cluster.mounts], key=lambda text: mount(text)[1])
    if cluster.container_runtime == "pyxis":
        pairs = [m if ":" in m else f"{m}:{m}" for m in mounts]
        return [
            f"--container-image={cluster.container}",
            f"--container-mounts={','.join(pairs)}",
            f"--container-workdir={here}",
        ], inside
    binds = [f"--bind={m}" for m in mounts]
    if cluster.container_runtime == "charliecloud":
        # Else a relative name is looked up among the images that ch-image keeps. --set-env takes the image's
        # own variables, PATH above all, from its file /ch/environment.
        path = Path(cluster.container)
        image = str(path.absolute()) if path.exists() else cluster.container
        return [], ["ch-run", "--set-env", *binds, f"--cd={here}", image, "--", *inside]
    nv = ["--nv"] if cluster.gpus_per_node else []
    return [], ["apptainer", "exec", *nv, *binds, f"--pwd={here}", cluster.container, *inside]


def needed(cluster: Cluster) -> dict[str, str]:
    """Variables that a runtime cannot do without: ch-run wants USER, which some services do not set."""
    if cluster.container and cluster.container_runtime == "charliecloud":
        return {"USER": getpass.getuser()}
    return {}
