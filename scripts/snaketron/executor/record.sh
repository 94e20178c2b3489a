# Read by the shell of each Slurm job before its command, with the directory for records in JOB_RECORDS.
#
# The names of empty files are the record: a file is there or not, and a full disk still takes a name.
#     4711.0.began     job 4711 began; it was requeued 0 times before
#     4711.0.exit.1    its command ended with status 1
# A shell that is killed leaves no second file.
JOB_RECORD=$JOB_RECORDS/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export JOB_RECORD
touch "$JOB_RECORD.began" 2>/dev/null || true

# Slurm requeues a job whose node is lost as often as that happens. JOB_REQUEUES says how often this job may begin
# again; then it fails, and Snakemake submits it anew as often as `retries` says.
if [ "${SLURM_RESTART_COUNT:-0}" -gt "${JOB_REQUEUES:-1000000}" ]; then
  echo "error: Slurm has requeued this job $SLURM_RESTART_COUNT times: its nodes are lost, or it is pre-empted" >&2
  touch "$JOB_RECORD.exit.1" 2>/dev/null || true
  exit 1
fi

# Runs the command of the job, in a step of Slurm where JOB_STEP has options of srun for that. The command does not see
# Slurm's variables of the whole job, which an srun in it would take for options; these are those that say which job it is.
job_runs() {
  for job_name in $(env | sed -n 's/^\(\(SLURM\|SRUN\|SBATCH\)_[A-Za-z0-9_]*\)=.*/\1/p'); do
    case $job_name in
      SLURM_JOB_ID | SLURM_JOBID | SLURM_CLUSTER_NAME | SLURM_SUBMIT_DIR | SLURM_SUBMIT_HOST) ;;
      *) unset "$job_name" ;;
    esac
  done
  if [ -n "${JOB_STEP:-}" ]; then
    # shellcheck disable=SC2086 # several options
    set -- srun $JOB_STEP "$@"
  fi
  "$@"
}

# Called as `command && job_ended || job_ended`.
job_ended() {
  job_status=$?
  touch "$JOB_RECORD.exit.$job_status" 2>/dev/null || true
  return "$job_status"
}
