"""How long the network is tried: by downloads and by questions to a service alike."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from snaketron.log import UserError, logger
from snaketron.sources.streams import TEMPORARY, Broken, watched

_LONGEST_PAUSE = 60.0  # seconds
_LONG = 10  # times as long as one answer may take a question that a client asks in many parts
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
# In names of exceptions.
_FAILED = ("Timeout", "TimedOut", "Connect", "Disconnected", "Network", "ProtocolError")


@dataclass(frozen=True)
class Patience:
    """How long a transfer or a question is tried."""

    retries: int = 8  # attempts in a row, after the first, that bring no byte
    stall_timeout: float = 60  # seconds without a byte after which a connection is given up
    first_pause: float = 1.0  # seconds before a retry; doubled each time, up to a minute

    def wait(self, address: str, error: Broken, failures: int) -> None:
        """Say what broke, and sleep as long as the server asked for, or longer with each failure."""
        pause = min(_LONGEST_PAUSE, self.first_pause * 2 ** (failures - 1))
        pause = error.pause or pause * random.uniform(0.5, 1)  # many downloads must not return at once
        logger.warning(
            "%s: %s; trying again in %.1f s (%d of %d)", *(address, error, pause, failures, self.retries)
        )
        time.sleep(pause)


def ask[T](call: Callable[[], T], *, at: str, what: str, patience: Patience, long: bool = False) -> T:
    """What a service's client answers to `call`, asked again when no answer comes or the connection fails.

    `at` is the place in the configuration, and `what` is asked about. A `long` question, such as a listing
    of many pages, may take ten times as long. Raises `UserError` when patience ends, or when asking again
    would not help.
    """
    timeout = patience.stall_timeout * (_LONG if long else 1)
    failures = 0
    while True:
        try:
            with contextlib.closing(watched(lambda: _once(call), timeout)) as answers:  # type: ignore[type-var]
                return next(answers)  # type: ignore[no-any-return]
        except UserError:
            raise
        except Exception as error:  # exceptions of these clients have no common class
            broken = _broken(error)
            if broken is None:
                logger.debug("%s: %s", at, what, exc_info=True)
                raise UserError(f"{at}: {what}: {_reason(error)}") from None
            failures += 1
            if failures > patience.retries:
                raise UserError(
                    f"{at}: {what}: {broken}; asked {failures} times. Check the endpoint and the network, "
                    "and run again"
                ) from None
            patience.wait(f"{at}: {what}", broken, failures)


def _once[T](call: Callable[[], T]) -> Iterator[T]:
    yield call()


def _broken(error: Exception) -> Broken | None:
    """The error as one after which to ask again; None where another answer cannot be expected."""
    if isinstance(error, Broken):
        return error
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)  # botocore's responses are dictionaries and have none
    if status is not None:
        return Broken(f"the server answered {status}") if status in TEMPORARY else None
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if isinstance(error, _FINAL) or not (
        isinstance(error, OSError | TimeoutError) or any(name in names for name in _FAILED)
    ):
        return None
    return Broken(_named(error))


def _reason(error: Exception) -> str:
    """Why a service cannot answer, and what to do where that is known."""
    name = type(error).__name__
    if name == "GatedRepoError":
        return (
            "the hub gives it only to accounts that were given access. Ask for access on its page, and set "
            f"HF_TOKEN to a token of that account ({name})"
        )
    if name == "RepositoryNotFoundError":
        return (
            "the hub has no repository of this name, or it is private. Correct the name, or set HF_TOKEN to "
            f"a token of an account that may read it ({name})"
        )
    if "scripts are no longer supported" in str(error):
        return "a program makes this data set, which is not run; convert it to files that can be read"
    if isinstance(error, PermissionError) or "Credentials" in name:
        return f"no access ({_named(error)}); credentials come from the environment"
    return str(error) if isinstance(error, ImportError) else _named(error)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
