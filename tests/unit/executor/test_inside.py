"""The Snakemake in a job starts with less."""

from __future__ import annotations

import subprocess
import sys


def test_it_is_snakemake_without_pandas_numpy_and_requests_until_something_asks_for_it():
    """`--version` comes after all plugins were imported, and what one does with them works all the same."""
    script = (
        "import sys; from snaketron.executor import inside\n"
        "parts = ('pandas', 'core'), ('numpy', 'random'), ('requests', 'sessions')\n"
        "try: inside.main(['-m', 'snakemake', '--version'])\n"
        "except SystemExit: pass\n"
        "print(*(f'{name}.{part}' in sys.modules for name, part in parts), sys.argv)\n"
        "import importlib.util; assert importlib.util.find_spec('pandas')\n"
        "from snakemake_executor_plugin_slurm import efficiency_report as report\n"
        "print(report.parse_maxrss('2048K'), report.pd.isna(None), report.np.sqrt(4))\n"
        "from requests.adapters import HTTPAdapter; import requests; print(*requests.Session().adapters)\n"
        "print(*(f'{name}.{part}' in sys.modules for name, part in parts))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, late, asked, adapters, used = done.stdout.splitlines()
    assert version.count(".") == 2
    assert late == "False False False ['snakemake', '--version']"
    assert asked == "2.0 True 2.0" and "https://" in adapters
    assert used == "True True True"


def test_a_record_of_a_job_is_that_of_snakemake():
    """Its fields, their defaults and what is written of one, with SQLAlchemy and without."""
    script = (
        "import sys; from snaketron.executor import inside\n"
        "if sys.argv[1] == 'inside': sys.modules.update(inside.without_database())\n"
        "from snakemake import api; from snakemake.persistence import MetadataRecord as Record\n"
        "made = Record(rule='sft', input=['a', 'b'], starttime=1.5)\n"
        "print({name: str(field.annotation) for name, field in Record.model_fields.items()})\n"
        "again = Record.model_validate(made.model_dump())\n"
        "print(Record().model_dump(), made.model_dump_json(), again == made)\n"
        "print('sqlalchemy.orm' in sys.modules)"
    )
    plain, inside = (
        subprocess.check_output([sys.executable, "-c", script, which], text=True).splitlines()
        for which in ("plain", "inside")
    )
    assert inside[:2] == plain[:2] and "'sft'" not in inside[0] and '"rule":"sft"' in inside[1]
    assert (plain[2], inside[2]) == ("True", "False")
