"""The package under the workflow: all logic."""

import os

# numpy starts a thread for each core when it is imported, and each looks for work in a loop before it sleeps:
# 0.1 s of CPU on 2 cores in every program. Nothing here multiplies matrices with numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
