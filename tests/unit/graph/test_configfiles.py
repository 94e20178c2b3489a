"""The newest log of Snakemake tells which files of --configfile its run had; the words are Snakemake's."""

from __future__ import annotations

from pathlib import Path

from snaketron.graph.configfiles import of_last_run


def test_the_newest_log_names_the_files(tmp_path: Path):
    """Snakemake prints a list of Python, which has files of --configfile as paths."""
    assert of_last_run(tmp_path) == []
    for day, files in (
        ("27", "[]"),
        ("28", "[PosixPath('/run/it(s).yaml'), PosixPath('b.yaml'), 'config/config.yaml']"),
    ):
        said = f"SNAKEMAKE\n=========\n  Date: 2026-11-{day}\n  Config file(s): {files}\n"
        (tmp_path / f"2026-11-{day}T193834.snakemake.log").write_text(said)
    assert of_last_run(tmp_path) == [Path("/run/it(s).yaml"), Path("b.yaml")]
