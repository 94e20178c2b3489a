"""TensorBoard: the numbers of `metrics.jsonl` as event files in `tensorboard/` of the version."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any

from snaketron.log import UserError
from snaketron.tracking.sinks import Run, numbers


class TensorBoard:
    """Event files of a training. Each job writes them anew from the first line: they are a copy."""

    name = "TensorBoard"

    def __init__(self, run: Run) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise UserError(
                "not installed: `uv sync --extra tensorboard`, or configure tensorboard: false"
            ) from None

        directory = run.directory / "tensorboard"
        shutil.rmtree(directory, ignore_errors=True)
        self.event, self.summary, self.writer = Event, Summary, EventFileWriter(str(directory), flush_secs=10)

    def log(self, line: Mapping[str, Any]) -> None:
        values = [self.summary.Value(tag=tag, simple_value=value) for tag, value in numbers(line)]
        summary = self.summary(value=values)
        self.writer.add_event(self.event(wall_time=time.time(), step=line["iteration"], summary=summary))

    def alert(self, title: str, text: str, *, failed: bool) -> None:
        pass  # it has none

    def finish(self, outcome: str | None) -> None:
        self.writer.close()
