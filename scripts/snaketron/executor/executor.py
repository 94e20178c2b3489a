"""Snakemake's Slurm executor, with another way to learn what became of a job, and to submit one.

It is the executor plugin `slurm` in all but this:

- Whether a job is over is known from its own record and from squeue. The plugin asks `sacct` alone whenever
  `scontrol show config` takes more than 10 s, or MinJobAge is below three of its pauses. So it waits for ever
  on a cluster without accounting.
- A submission that Slurm could not take now is tried again, and one that it refuses is not.
- A job that ended with an error that another try would meet again is not submitted again.
- A job waits for one that an earlier Snakemake, which was killed, left behind.
- One Snakemake runs in a job, as a step of Slurm. The plugin has it start a second one for that.

What it takes from the plugin is pinned with the plugin's version in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from snaketron.executor import request
from snaketron.executor.records import COMMAND, Record, Records
from snaketron.executor.submitter import Submitter, title
from snaketron.executor.verdict import ABSENT, explanation, verdict
from snaketron.files import no_room
from snaketron.graph import process
from snaketron.jobs import queue, slurm

import snakemake_executor_plugin_slurm as plugin
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_logger_plugins.common import LogEvent

common_settings = plugin.common_settings

LOOK_S = 5  # between two looks at the records
RECORDS = Path(".snakemake/slurm_jobs")
ROOM = 65_536  # bytes; a working directory with less is full
OLD_S = 10 * 86400  # after so many seconds the records of a Snakemake that was killed are deleted


class Executor(plugin.Executor):
    """Submits jobs to Slurm and follows them to their end."""

    def __post_init__(self, test_mode: bool = False) -> None:
        settings = self.workflow.executor_settings
        settings.requeue = not settings.no_requeue  # a job whose node is lost, or that is pre-empted
        if settings.array_jobs:
            raise WorkflowError(
                "snaketron-slurm-array-jobs: jobs of arrays are not followed (docs/slurm.md); leave it out"
            )
        super().__post_init__(test_mode)
        here = Path(self.workflow.workdir_init)
        _delete_old(here / RECORDS)
        self.records = Records((here / RECORDS / self.run_uuid).absolute())
        self.records.directory.mkdir(parents=True, exist_ok=True)
        self.submitter = Submitter(self.run_uuid, here, self.logger)
        self.final: set[Any] = set()  # jobs that ended with an error that another try would meet again
        self.said: dict[str, str] = {}  # what squeue said of a job
        self.since: dict[str, float] = {}  # and since when
        self.pause = self.first_pause = float(settings.init_seconds_before_status_checks)
        self.asked = time.monotonic()
        self.failed: set[tuple[str, int]] = set()  # jobs whose record says so, and their requeues before
        self.accounting = True  # as far as is known
        self.silent_since: float | None = None  # since when squeue does not answer

    # ------------------------------------------------------------------------------------ submitting

    def get_job_exec_prefix(self, job: Any) -> str:
        jobs = job.jobs if job.is_group() else [job]
        # Trainings and evaluations, which have settings of a run, requeue themselves at their time limit.
        bounded = not any(one.resources.get("run") for one in jobs)
        return self.records.before(bounded=bounded, step=request.step_options(job))

    def get_python_executable(self) -> str:
        # The plugin puts `-m snakemake` after it.
        return f"{COMMAND} {super().get_python_executable()} -m snaketron.executor.inside"

    def additional_general_args(self) -> str:
        return "--executor local"

    def get_job_exec_suffix(self, job: Any) -> str:
        return self.records.after

    def get_partition_arg(self, job: Any) -> str:
        return f"{super().get_partition_arg(job)} {request.ALWAYS}{self.submitter.dependency(job)}"

    def get_account_arg(self, job: Any) -> Iterator[str]:
        """Without the plugin's look-up of the account before each job: sbatch refuses a wrong one."""
        yield request.account(job)

    def _submit_job(self, job: Any) -> None:
        self.run_job_pre(job)
        with process.interrupts_put_off():  # cancel() would not wait for a thread that is not noted yet
            submitting = self._job_submission_executor.submit(self.run_job, job)
        submitting.add_done_callback(lambda done: self._check_submitted(job, done))

    def _check_submitted(self, job: Any, done: Future[None]) -> None:
        """Report what went wrong in the thread, which nobody else would: the job would be waited for."""
        if not done.cancelled() and (error := done.exception()):
            self._fail(job, f"it could not be submitted: {error}")

    def run_job(self, job: Any) -> None:
        refusal = self.submitter.submit(job, lambda: super(Executor, self).run_job(job))
        if refusal is not None:
            self.final.add(job)
            self._fail(job, f"it is refused and not submitted again: {refusal}")

    def report_job_submission(self, job_info: SubmittedJobInfo, register_job: bool = True) -> None:
        self.submitter.submitted.add(job_info.external_jobid)
        super().report_job_submission(job_info, register_job)

    def _report_job_error_threadsafe(self, job_info: SubmittedJobInfo, msg: str) -> None:
        """The plugin could not submit a job."""
        self.submitter.failed(job_info.job, msg)

    # ------------------------------------------------------------------------------------- following

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncIterator[SubmittedJobInfo]:
        self.next_seconds_between_status_checks = LOOK_S
        if not active_jobs:
            return
        records = await asyncio.to_thread(self.records.read)
        states: dict[str, str] | None = None
        if self._is_time_to_ask(records):
            async with self.status_rate_limiter:
                states = await asyncio.to_thread(self._ask)
            records = await asyncio.to_thread(self.records.read)
        any_over = False
        for info in active_jobs:
            job, record = info.external_jobid, records.get(info.external_jobid)
            state = None if states is None else states.get(job, ABSENT)
            match verdict(state, record, self._seconds(job, state), self._patience):
                case "succeeded":
                    self._succeed(info)
                case "failed":
                    by = await asyncio.to_thread(self._cancelled_by, job, state)
                    self._judge(info, state or ABSENT, record, by)
                case _:
                    yield info
                    continue
            any_over = True
            self.records.forget(job)
        if any_over:
            self.pause = self.first_pause

    @property
    def _patience(self) -> float:
        return self.workflow.execution_settings.latency_wait

    def _is_time_to_ask(self, records: dict[str, Record]) -> bool:
        """Squeue is asked after a pause that grows, and at once when a job has failed: it may be requeued."""
        failed = {(job, record.restarts) for job, record in records.items() if record.status}
        if failed - self.failed:
            self.pause = 0.0
        self.failed = failed
        return time.monotonic() >= self.asked + self.pause

    def _ask(self) -> dict[str, str] | None:
        """The states of all jobs of this run; None where squeue does not answer, which is said once."""
        self.asked = time.monotonic()
        # In the profile 40, 50, ... 180 s; after a failure that Slurm does not yet tell, 10, 20, ... s.
        self.pause = min(self.pause + self.first_pause / 4, 4.5 * self.first_pause)
        try:
            states = queue.states(self.run_uuid, self._submitted_job_clusters)
        except slurm.NoAnswer as error:
            if self.silent_since is None:
                self.silent_since = self.asked
                self.logger.warning(
                    f"{error}. Jobs run on, and those that succeed are noticed; Slurm is asked again."
                )
            self.pause = self.first_pause
            return None
        if self.silent_since is not None:
            self.logger.info(f"Slurm answers again, after {time.monotonic() - self.silent_since:.0f} s.")
            self.silent_since = None
        return states

    def _seconds(self, job: str, state: str | None) -> float:
        """For how long squeue has given this state of a job, as far as it was asked."""
        now = time.monotonic()
        if state is not None and self.said.get(job) != state:
            self.said[job], self.since[job] = state, now
        return now - self.since.get(job, now)

    def _cancelled_by(self, job: str, state: str | None) -> str | None:
        if self.accounting and state in ("CANCELLED", ABSENT):
            try:
                return queue.cancelled_by(job)
            except slurm.NoAnswer:
                self.accounting = False
        return None

    # ---------------------------------------------------------------------------------------- ending

    def _succeed(self, info: SubmittedJobInfo) -> None:
        if not self.workflow.executor_settings.keep_successful_logs:
            with contextlib.suppress(OSError):
                info.aux["slurm_logfile"].unlink()
        self.report_job_success(info)

    def _judge(self, info: SubmittedJobInfo, state: str, record: Record | None, by: str | None) -> None:
        """Say why a job failed, and whether another try may help."""
        log = info.aux["slurm_logfile"]
        why = f"Slurm job {info.external_jobid} {explanation(state, record, log, by)}"
        reason = record.final if record else None
        if reason is None and record and (lack := no_room(self.records.directory, ROOM)):
            reason = f"{lack} in {self.workflow.workdir_init}"
        if reason is not None:
            self.final.add(info.job)
            why += f" and is not submitted again: {reason or 'no space left on the disk'}"
        self._fail(info.job, why, log if record else None)

    def _fail(self, job: Any, why: str, log: Path | None = None) -> None:
        """Report the failure of a job; `log` is that of its Slurm job, None where it never began.

        What never began has no logs to show. Snakemake's own report of a group does not say why it failed.
        """
        logs = [str(log)] if log else []
        if job.is_group():
            extra = {
                "event": LogEvent.GROUP_ERROR,
                "groupid": job.groupid,
                "rule_msg": why,
                "aux_logs": logs,
                "job_error_info": [member.get_log_error_info(indent=True) for member in job.jobs],
            }
        else:
            extra = job.get_log_error_info(why, aux_logs=logs)
        if not log:
            for info in extra.get("job_error_info", [extra]):
                info["log"] = []
        self.logger.error(f"Error in {title(job)}: {why}", extra=extra)
        if log and job.is_group():
            for member in job.jobs:
                member.log_error(indent=True)
        self.workflow.scheduler.error_callback(job)

    def handle_job_error(self, job: Any) -> None:
        """Snakemake calls this before it decides whether to submit a job again."""
        super().handle_job_error(job)
        if job in self.final:
            job.attempt = max(job.attempt, job.restart_times + 1)

    # -------------------------------------------------------------------------------------- stopping

    def cancel(self) -> None:
        self.submitter.stop()
        self._job_submission_executor.shutdown(wait=True, cancel_futures=True)
        super().cancel()

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Cancel all jobs of this run, those too that were submitted a moment ago."""
        clusters = [f"--clusters={','.join(sorted(self._submitted_job_clusters))}"]
        command = ["scancel", f"--name={self.run_uuid}", *(clusters if self._submitted_job_clusters else [])]
        try:
            slurm.ask(*command)
        except slurm.NoAnswer as error:
            self.logger.error(f"{error}. The jobs live on; when Slurm answers again: {' '.join(command)}")

    def shutdown(self) -> None:
        settings = self.workflow.executor_settings
        if settings.efficiency_report:
            try:
                known = slurm.ask("sacct", "-X", "--noheader", f"--name={self.run_uuid}", "--format=State")
            except slurm.NoAnswer:
                known = ""  # there is no accounting
            settings.efficiency_report = bool(known.strip())  # of no job, it is a puzzling line
        super().shutdown()
        shutil.rmtree(self.records.directory, ignore_errors=True)


def _delete_old(directory: Path) -> None:
    for path in directory.glob("*"):
        if time.time() - path.stat().st_mtime > OLD_S:
            shutil.rmtree(path, ignore_errors=True)
