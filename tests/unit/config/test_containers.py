"""Paths that a container runtime cannot be given are refused before the first job."""

from __future__ import annotations

import re
from pathlib import Path

from snaketron.config import Cluster, ConfigError, load
from snaketron.config.containers import check_container
from tests.conftest import REPOSITORY

import pytest

HERE = Path("/cluster/a")


@pytest.mark.parametrize(
    ("runtime", "mounts", "refused"),
    [
        ("apptainer", ["/a", "/a:/b", "/a:/b:ro", "/a,b"], ["/a,b"]),
        ("pyxis", ["/a", "/a:/b", "/a:/b:ro", "/a:/b,c"], ["/a:/b,c"]),
        ("charliecloud", ["/a,b", "/a:/b", "/a:/b:ro"], ["/a:/b:ro"]),
        ("apptainer", ["/12:30:45", "data", "~/x", "/a:b", ""], ["/12:30:45", "data", "~/x", "/a:b", ""]),
    ],
)
def test_mounts_that_a_runtime_would_take_apart_are_refused(runtime, mounts, refused):
    cluster = Cluster(container="image", container_runtime=runtime, mounts=mounts)
    problems = check_container(cluster, HERE)
    assert [eval(problem.split("] ")[1].split(": ")[0]) for problem in problems] == refused
    assert check_container(cluster.model_copy(update={"container": None}), HERE) == []


@pytest.mark.parametrize(
    ("runtime", "refused"), [("apptainer", ":,"), ("pyxis", ":,"), ("charliecloud", ":")]
)
def test_a_working_directory_that_a_runtime_would_take_apart_is_refused(runtime, refused):
    cluster = Cluster(container="image", container_runtime=runtime)
    for character in ":,":
        problems = check_container(cluster, Path(f"/cluster/a{character}b"))
        assert bool(problems) == (character in refused)


def test_the_message_names_the_key_and_what_to_do():
    with pytest.raises(ConfigError) as error:
        load({"cluster": {"container": "a.sif", "mounts": ["/data", "/my, data"]}}, {})
    assert str(error.value) == (
        "cluster.mounts[1] '/my, data': apptainer takes `path` or `path:path_inside`, or with :ro at its "
        "end, and a path with : or , not at all; mount a directory above it"
    )


def test_both_recipes_of_the_image_have_the_same_base_files_and_commands():
    apptainer, buildah = (
        (REPOSITORY / "envs" / name).read_text() for name in ("snaketron.def", "Containerfile")
    )
    files = r"pyproject.toml|README.md|scripts(?= /opt)|envs/install.sh"
    for words in (r"nvidia/cuda:\S+", files, r"sh /opt/snaketron/\S+", r"PATH=/opt/venv/bin:\$PATH"):
        one, other = (set(re.findall(words, recipe)) for recipe in (apptainer, buildah))
        assert one == other != set()
