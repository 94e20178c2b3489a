# From raw text to an instruction-tuned checkpoint:
#     snakemake --profile profiles/local ckpt/sft
# Outputs lie at <root>/<stage>/<noun>; a wildcard fills one component of a path.
import atexit
import gc
import sys
from functools import partial
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.pathvars import Pathvars
from snakemake.utils import min_version

min_version("9.27")
# At its end Python would look at every object again: 0.5 of the 2.3 s of CPU that a small dry-run takes.
atexit.register(gc.freeze)
# The defaults spend 15 % of a dry-run of 7,000 jobs on garbage collection of the graph.
gc.set_threshold(200_000, 50, 1000)
sys.path.insert(0, f"{workflow.basedir}/scripts")

from snaketron import credentials
from snaketron.config import ConfigError, load
from snaketron.config.data import SPLITS
from snaketron.config.doubled import check_doubled
from snaketron.executor import request
from snaketron.graph import configfiles, dry_run, notes, outlook, process, terminal
from snaketron.graph.checks import (
    check_files,
    check_lengths,
    check_secrets,
    check_tokenizer,
)
from snaketron.graph.graph import Graph
from snaketron.graph.journal import Writer
from snaketron.graph.requests import ask_for_threads, check_requests
from snaketron.graph.snakemake import replace_pieces
from snaketron.graph.stops import Stops
from snaketron.graph.submission import check_submission
from snaketron.jobs import status
from snaketron.log import UserError, to_be_mended
from snaketron.sources import registered
from snaketron.sources.formats import DOWNLOADED
from snaketron.sources.models import MODEL_FILE, TASK_FILE
from snaketron.tracking import notify

if (
    wrong := process.elsewhere(Path(workflow.basedir))
    or process.mixed()
    or process.unwritable()
    or (workflow.is_main_process and process.cramped())
):
    raise WorkflowError(wrong)


configfile: "config/config.yaml"


container: "envs/snaketron.sif"


wildcard_constraints:
    corpus=r"[a-z0-9_]+",
    source=r"[a-z0-9_]+",
    phase=r"[a-z0-9_]+",
    group=r"[a-z0-9_]+",
    shard=r"[a-z0-9_.]+",


process.find_python()
process.name_user()
try:
    if workflow.is_main_process:
        check_doubled(
            ["config/config.yaml", *workflow.overwrite_configfiles],
            workflow.config_settings.config_args or (),
            sys.argv,
        )
    graph = Graph(
        load(config, arguments=workflow.config_settings.config_args or ()),
        workflow.overwrite_configfiles,
        assuming=workflow.is_main_process,
    )
    if workflow.is_main_process:
        graph.watch(workflow)
        check_submission(workflow, graph.paths())
        registered.check(graph.config)
        check_files(graph.config, graph.text, graph.conversations, graph.lock)
        check_lengths(graph.config)
        check_tokenizer(graph.config)
        check_secrets(graph.config)
except ConfigError as error:
    raise WorkflowError(f"The configuration is wrong.\n{error}") from None


ckpt = Path(graph.config.pathvars["ckpt"])
workflow.pathvars.update(Pathvars.from_config({"pathvars": graph.config.pathvars}))
replace_pieces(workflow, graph.config)
ask_for_threads(workflow)
logger.addFilter(credentials.Redact())
if workflow.is_main_process:
    for note in notes.of_configuration(graph, workflow.overwrite_configfiles):
        logger.info(note)
    process.at_end(
        partial(notes.explain, workflow, graph),
        partial(dry_run.explain, workflow, graph, request.sbatch_options),
    )


# Before the first job; a dry-run does not come here.
onstart:
    process.obey_interrupts()
    if graph.lock.unlisted:
        raise WorkflowError(graph.lock.assumed())
    try:
        alone = process.hold(process.LOCK)
    except (OSError, UserError) as error:
        raise WorkflowError(to_be_mended(error) or str(error)) from None
    if not alone:
        raise WorkflowError(
            "Another Snakemake is running in this directory; wait for it or stop it."
        )
    configfiles.keep(graph.config, workflow.overwrite_configfiles)
    workflow.log_missing_metadata_info()  # which Snakemake does in a dry-run alone
    if replaced := notes.replaced_by(workflow):
        logger.warning(replaced)
    trainings = outlook.trainings(graph.config, workflow.dag)
    for line in outlook.lines(trainings):
        logger.info(line)
    if workflow.executor_plugin.name == "slurm":
        raise WorkflowError(
            "executor: slurm waits for ever for some jobs (docs/slurm.md). Take `executor: snaketron-slurm`, as"
            " profiles/slurm does, and write `snaketron-slurm-` for `slurm-` in the names of its options."
        )
    planned = {training.name: training.numbers for training in trainings}
    stops = Stops(process.interrupted)
    logger.addHandler(Writer(Path.cwd(), workflow.dag.stats()[1], planned, stops))
    if workflow.executor_plugin.name == "snaketron-slurm":
        say = partial(logger.info, extra={"in_view": True})
        status.report_every(60, Path.cwd(), ckpt, say)
    terminal.begin_view()


onsuccess:
    graph.keep_records()
    process.leave_interrupts()
    notify.tell_of_workflow(graph.config.notify.command, "finished", ckpt, log)


onerror:
    graph.keep_records()
    what, jobs = process.ending(workflow)
    process.leave_interrupts()
    notify.tell_of_workflow(graph.config.notify.command, what, ckpt, log, jobs)


rule all:
    default_target: True
    input:
        "<ckpt>/sft",


include: "rules/sample.smk"
include: "rules/sources.smk"
include: "rules/tokenizer.smk"
include: "rules/curation.smk"
include: "rules/pretrain_data.smk"
include: "rules/pretrain.smk"
include: "rules/sft_data.smk"
include: "rules/sft.smk"
include: "rules/lora.smk"
include: "rules/model.smk"
include: "rules/report.smk"


if workflow.is_main_process:
    try:
        graph.training.limits = check_requests(workflow, graph.config)
    except ConfigError as error:
        raise WorkflowError(f"The configuration is wrong.\n{error}") from None
