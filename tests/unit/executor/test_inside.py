"""The Snakemake in a job starts with less."""

from __future__ import annotations

import subprocess
import sys


def test_it_is_snakemake_without_pandas_until_something_asks_for_it():
    """`--version` comes after all plugins were imported, and what one does with pandas works all the same."""
    script = (
        "import sys; from snaketron.executor import inside\n"
        "try: inside.main(['-m', 'snakemake', '--version'])\n"
        "except SystemExit: pass\n"
        "print('pandas' in sys.modules, 'pandas.core' in sys.modules, sys.argv)\n"
        "import importlib.util; assert importlib.util.find_spec('pandas')\n"
        "from snakemake_executor_plugin_slurm import efficiency_report as report\n"
        "print(report.parse_maxrss('2048K'), report.pd.isna(None), 'pandas.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, late, asked = done.stdout.splitlines()
    assert version.count(".") == 2
    assert late == "True False ['snakemake', '--version']"
    assert asked == "2.0 True True"
