"""What a process does first that shares its GPU with others of the same training.

Python imports this where PYTHONPATH names its folder. NCCL refuses two processes on one GPU of a host, so
each says that it is on a host of its own: NCCL connects them by sockets then.
"""

import os

if "RANK" in os.environ:
    os.environ["NCCL_HOSTID"] = os.environ["RANK"]
    os.environ["LOCAL_RANK"] = "0"  # its number among the processes of its host
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
