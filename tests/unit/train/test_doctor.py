"""What the doctor says about this machine and about broken ones."""

from __future__ import annotations

from pathlib import Path

from snaketron.train import doctor
from snaketron.train.doctor import Finding

import pytest
import torch


def test_a_disk_that_can_be_written_is_measured_and_left_clean(tmp_path: Path):
    (found,) = doctor.disk(tmp_path / "ckpt")
    assert "MB/s" in found.text and "has locks" in found.text
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_a_slow_disk_is_a_problem_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e15)
    (found,) = doctor.disk(tmp_path)
    assert not found.good and found.text.endswith("move pathvars.ckpt, or raise save_interval")


def test_a_directory_that_cannot_be_made_is_a_problem(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (found,) = doctor.disk(tmp_path / "file/ckpt")
    assert found == Finding(
        "disk", False, f"{tmp_path}/file/ckpt: Not a directory; move pathvars.ckpt to another disk"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_problem_where_one_is_wanted(tmp_path: Path):
    assert all(finding.good for finding in doctor.examine(tmp_path, 0) if finding.name != "disk")
    (found,) = doctor._torch(2)
    assert not found.good and "sees 0 of 2 GPUs" in found.text


def test_a_driver_that_does_not_answer_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no devices were found'\nexit 9\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (found,) = doctor._driver(1)
    assert found == Finding("driver", False, "nvidia-smi fails: NVIDIA-SMI has failed: no devices were found")


def test_a_kernel_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "KERNELS", {"mamba-ssm": "no_such_module"})
    (found,) = doctor._kernels()
    assert not found.good and found.text.startswith("mamba-ssm: ModuleNotFoundError")
    assert "uv sync --extra gpu" in found.text


def test_a_machine_without_a_compiler_starts_no_kernels_of_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor._compiler()
    assert not found.good and found.text.startswith(
        "no gcc and no clang here, and Triton starts kernels by it"
    )


def test_a_compiler_needs_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that says what the real one would: its line is quoted."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\ngrep -q Python.h && echo 'Python.h: No such file' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    (found,) = doctor._compiler()
    assert not found.good and found.text.startswith(f"{compiler} fails: Python.h: No such file; Triton needs")
    compiler.chmod(0o644)
    (found,) = doctor._compiler()
    assert not found.good and found.text.startswith(f"{compiler} fails: Permission denied; Triton needs")
    compiler.chmod(0o755)
    compiler.write_text("#!/bin/sh\nexit 0\n")
    (found,) = doctor._compiler()
    assert found == Finding("compiler", True, f"{compiler}, with Python's headers")


def test_the_report_counts_problems():
    lines: list[str] = []
    findings = [Finding("driver", True, "one"), Finding("disk", False, "full"), Finding("NCCL", False, "no")]
    assert not doctor.report(iter(findings), lines.append)
    assert lines[1:] == ["PROBLEM  disk          full", "PROBLEM  NCCL          no", "2 problems."]
    assert doctor.report(iter(findings[:1]), lines.append)
    assert lines[-1] == "This machine can train."
