"""What the doctor says about the nodes of an allocation: two processes here stand for two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from snaketron.train.doctor import Finding
from snaketron.train.doctor_nodes import Seen, compare, judge, rank

import pytest

DOCTOR = Path(__file__).parents[3] / "scripts/doctor.py"


def test_two_nodes_meet_and_measure_their_network(tmp_path: Path):
    def start(number: int) -> subprocess.Popen[str]:
        step = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
        return subprocess.Popen(
            [sys.executable, DOCTOR, "--directory", tmp_path / "ckpt"],
            env=os.environ | step | {"SLURMD_NODENAME": f"n{number}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first, second = (start(number) for number in (0, 1))
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "2 processes on 2 nodes (n0 1, n1 1)" in said[0] and "all-reduce over all at " in said[0]
    assert "These nodes can train." in said[0] and said[1] == ""
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_one_process_is_no_allocation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert rank() is None


def test_what_differs_between_nodes_is_named():
    ill = Finding("kernels", False, "mamba-ssm: no module")
    seen = [
        Seen("a", {"torch": "2.11", "GPU": "H100"}, []),
        Seen("b", {"torch": "2.10", "GPU": "H100"}, [ill]),
        Seen("b", {"torch": "2.10", "GPU": "H100"}, []),
    ]
    nodes, kernels, torch = compare(seen)
    assert not nodes.good and nodes.text.startswith("3 processes on 2 nodes (a 1, b 2); ")
    assert kernels == Finding("kernels", False, "b: mamba-ssm: no module")
    assert torch.text == "torch is not the same everywhere: 2.11 on a; 2.10 on b"


def test_a_slow_node_is_named_among_its_neighbours():
    good = {"all": 40e9, "a": 280e9, "b": 280e9, "c": 280e9, "d": 280e9}
    pairs = {"a and b": 45e9, "b and c": 45e9, "c and d": 9e9}
    slow, whole = judge(good | pairs)
    assert slow.text.startswith("c and d: 9.0 GB/s, where 45.0 are usual between two nodes; ")
    assert whole.good and "within a node 280.0 GB/s; between two nodes 45.0 GB/s" in whole.text
