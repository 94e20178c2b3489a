"""`snakemake` that asks Slurm for its jobs every second, for tests.

The Slurm executor adds 10 s to its pause each time that no job has finished: right for a cluster that
many share, a minute too long here. Only the submitting process is concerned. It ends with the tests
that started it: without a cluster it would wait for its jobs for ever.
"""

import ctypes
import os
import signal
import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

PR_SET_PDEATHSIG = 1  # prctl(2)

ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() == 1:
    sys.exit("the tests ended before that")
RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, value: None)

sys.exit(main())
