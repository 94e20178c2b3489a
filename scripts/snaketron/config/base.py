"""What every section of the configuration is made of."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

# Looking for plugins of pydantic reads the metadata of all installed packages, in 40 ms of each job.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from snaketron.log import UserError

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[a-z0-9_]+$"
Name = Annotated[str, Field(pattern=NAME)]
Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_MOST = 2**53  # beyond it floating-point numbers, in which times and sizes are computed, have gaps
Positive = Annotated[int, Field(gt=0, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Mixed = Annotated[float, Field(gt=0, le=_MOST)]  # in a mix; the sum of all must be a number, too
# numpy.random.RandomState, with which megatron-core shuffles, takes no larger seed.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise", "nvfp4"]
Module = Literal["layer", "core_attn", "layernorm", "mlp", "moe", "shared_experts", "scan"]
Dispatcher = Literal["alltoall", "allgather", "deepep", "hybridep"]
FLEXIBLE = ("deepep", "hybridep")  # dispatchers of the package deep_ep


class ConfigError(UserError, ValueError):
    """The configuration is wrong; the message names each path. pydantic wants a `ValueError`."""


class Section(BaseModel):
    # Built when first used: a job uses few of some forty sections, and building all takes 60 ms.
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, defer_build=True)


def key(default: Any, description: str) -> Any:
    """A configuration key; a callable default builds a list or a section."""
    if callable(default):
        return Field(default_factory=default, description=description)
    return Field(default, description=description)


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like another one; None where none is."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1, cutoff=cutoff)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known."""
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
