"""Paths of the host for a container runtime: one that its command line would take apart is refused."""

from __future__ import annotations

from pathlib import Path

from snaketron.config.cluster import Cluster

# What a runtime takes a mount apart at, beside the colon that all of them read.
_SEPARATORS = {"apptainer": ",", "pyxis": ",", "charliecloud": ""}
_OPTIONS = {"apptainer": {"ro", "rw"}, "pyxis": {"ro", "rw"}, "charliecloud": set()}


def mount(text: str) -> tuple[str, str, str]:
    """Path of the host, path inside, and options of an entry of `cluster.mounts`.

    >>> mount("/data"), mount("/a:/b:ro")
    (('/data', '/data', ''), ('/a', '/b', 'ro'))
    """
    outside, _, rest = text.partition(":")
    inside, _, options = rest.partition(":")
    return outside, inside or outside, options


def check_container(cluster: Cluster, here: Path) -> list[str]:
    """Problems of what the image of the trainings is to see; `here` is the working directory."""
    if cluster.container is None:
        return []
    runtime = cluster.container_runtime
    separators, options_of = _SEPARATORS[runtime], _OPTIONS[runtime]
    problems = [
        f"the working directory {str(here)!r}: {runtime} takes paths apart at {character!r}; rename it"
        for character in (":", *separators)
        if character in str(here)
    ]
    forms = "`path` or `path:path_inside`" + (", or with :ro at its end" if options_of else "")
    for i, text in enumerate(cluster.mounts):
        outside, inside, options = mount(text)
        if not (outside.startswith("/") and inside.startswith("/")):
            why = f"absolute paths are needed, as {forms}"
        elif (options and options not in options_of) or any(c in text for c in separators):
            why = f"{runtime} takes {forms}, and a path with {' or '.join((':', *separators))} not at all"
            why += "; mount a directory above it"
        else:
            continue
        problems.append(f"cluster.mounts[{i}] {text!r}: {why}")
    return problems
