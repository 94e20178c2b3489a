"""An image made from the files of this machine's packages, which the Python of the tests runs in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.conftest import REPOSITORY

# Beside the libraries of the Python and what is compiled in C++: a shell.
PACKAGES = ("base-files", "libc6", "libc-bin", "libstdc++6", "libgcc-s1", "dash")
# ch-run lays the machine's own over these files, and mounts these directories.
FILES = ("etc/passwd", "etc/group", "etc/hosts", "etc/resolv.conf")
DIRECTORIES = ("dev", "proc", "sys", "tmp", "root", "home", "ch")


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def packages() -> set[str]:
    """Packages of the files that the Python needs, as Debian calls them."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    modules = [str(path) for path in (stdlib / "lib-dynload").glob("*.so") if "tkinter" not in path.name]
    libraries = re.findall(r"=> \S+/(\S+) ", call("ldd", str(Path(sys.executable).resolve()), *modules))
    found = {f"*/{name}" for name in libraries if not name.startswith("libpython")}
    if stdlib.is_relative_to("/usr/lib"):
        found |= {f"{stdlib}/*", str(Path(sys.executable).resolve())}
    owners = call("dpkg-query", "--search", *found)
    return {name.strip() for line in owners.splitlines() for name in line.rpartition(": ")[0].split(",")}


def make_image(root: Path, mounts: list[str]) -> None:
    """Write a root with what `packages` names, and a place for each of `mounts`."""
    root.mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/", name).is_symlink():  # into /usr
            (root / name).symlink_to(Path("/", name).readlink())
    for line in call("dpkg-query", "--listfiles", *PACKAGES, *sorted(packages())).splitlines():
        path = Path(line)
        if path.is_absolute() and "doc" not in path.parts and (path.is_symlink() or path.is_file()):
            path = path.parent.resolve() / path.name
            copied = root / path.relative_to("/")
            copied.parent.mkdir(parents=True, exist_ok=True)
            if not copied.is_symlink():
                shutil.copy2(path, copied, follow_symlinks=False)
    for name in (*DIRECTORIES, *(mount.lstrip("/") for mount in mounts)):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "ch/environment").write_text(f"PATH={sys.prefix}/bin:/usr/bin:/bin\n")


def environment_of_tests(*more: Path) -> list[str]:
    """Directories of the machine that an image has to see: the Python, its packages, the repository."""
    places = {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY, *more} - {Path("/usr")}
    inner = {place for place in places for other in places if place != other and place.is_relative_to(other)}
    return sorted(map(str, places - inner))
