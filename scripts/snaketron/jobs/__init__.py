"""What is around the processes of a training; nothing here imports torch.

- Where a training works: `version`; whether a longer one may begin there: `continuation`; all of them:
  `inventory`.
- Who trains there: `owner`; what starts and watches the processes: `supervisor`, with `launch`, `containers`,
  `attempts`, `heartbeat` and `places`.
- What lies in metrics.jsonl, and what a file that grows has got since one looked: `lines`.
- What Slurm says: `slurm` about one job, `queue` about all, `status` to a person.
"""
