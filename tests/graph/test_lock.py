"""One Snakemake at a time runs jobs in a directory; looking is always allowed."""

from __future__ import annotations

import fcntl

from tests.conftest import Workspace


def test_a_second_run_is_refused_and_a_look_is_not(workspace: Workspace):
    lock = workspace.write(".snakemake/snaketron.lock", "")
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = workspace.snakemake("data/tokenizer/chat_template.jinja")
        assert second.status != 0
        assert "Another Snakemake is running in this directory; wait for it or stop it." in second.output
        assert not (workspace.path / "data").exists()
        for look in (["-n"], ["--lint"], ["--summary"]):
            result = workspace.snakemake(*look)
            assert result.status == 0, result.output
    assert workspace.snakemake("data/tokenizer/chat_template.jinja").status == 0
