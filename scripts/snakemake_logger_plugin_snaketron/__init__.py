"""Makes `snakemake --logger snaketron` known: Snakemake finds plugins by the name of their package."""

from snaketron.graph import terminal
from snaketron.graph.snakemake.errors import tell_wrong_configfiles, tell_wrong_keys
from snaketron.log import speak_utf8

__all__ = ["LogHandler"]

speak_utf8()  # as the jobs do: shards are called after files
tell_wrong_configfiles()
tell_wrong_keys()


class LogHandler(terminal.LogHandler):
    """With the live view, which is of a room above that of the lines."""

    def begin_view(self) -> terminal.LiveView:
        from snaketron.report.view import LiveView  # rich takes 0.1 s, and a dry-run has no view

        return LiveView(self.stream, colors=self.colors)
