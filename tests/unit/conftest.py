"""Scripts as a shell runs them, in this process."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable
from typing import Any

from snaketron import log
from tests.conftest import REPOSITORY

import pytest

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def run_script(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a script's `main` as `python scripts/NAME.py ARGS` does; returns exit status and standard error."""

    def run(name: str, *args: Any) -> tuple[int, str]:
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                log.run(lambda: module.main([str(arg) for arg in args]))
        finally:
            signal.signal(signal.SIGTERM, handler)
        return int(stop.value.code or 0), capsys.readouterr().err

    return run
