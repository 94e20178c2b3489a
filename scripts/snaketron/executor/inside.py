"""The Snakemake in a Slurm job: `python -m snaketron.executor.inside -m snakemake ...`.

Every Snakemake imports all executor plugins, and that of Slurm imports pandas and numpy, for a report that
only the Snakemake that submits makes. To open a local file it imports requests, for files on the web. For
records in a database it imports SQLAlchemy, and those of a job are in files. That is two thirds of the CPU
time for which a job starts Snakemake.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

LATE = ("numpy", "pandas", "requests")


class Late(ModuleType):
    """Stands for a module, which is imported when something of it is used.

    `importlib.util.LazyLoader` would import it at the next `import` statement already.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.find_spec(name)  # Snakemake asks whether there is a pandas

    def __getattr__(self, name: str) -> Any:
        # What importing asks for; the path it wants for a module inside.
        if name.startswith("__") and name not in ("__path__", "__version__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def no_database(**_: Any) -> None:
    sys.exit("persistence-backend: a job keeps its records in files; take `db` out of the default profile")


def without_database() -> dict[str, ModuleType]:
    """Modules with the names that Snakemake takes for its class of a record, a model of pydantic."""
    from pydantic import BaseModel, Field

    names: dict[str, dict[str, Any]] = {
        "sqlalchemy": {"Column": lambda _: None, "JSON": None},
        "sqlmodel": {"SQLModel": BaseModel, "Field": lambda sa_column=None, **keys: Field(**keys)},
        "snakemake.persistence.db": {"DbPersistence": no_database},
    }
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        vars(module).update(names[name])
    return modules


def main(arguments: list[str]) -> None:
    """Run Snakemake with what follows `-m snakemake`."""
    for name in LATE:
        sys.modules.setdefault(name, Late(name))
    sys.modules.update(without_database())
    from snakemake import cli

    sys.argv = ["snakemake", *arguments[2:]]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
