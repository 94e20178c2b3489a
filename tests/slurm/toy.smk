# Jobs that cost nothing, each with its own fate. test_without_accounting.py does to them what happens.
import sys

sys.path.insert(0, f"{workflow.basedir}/../../scripts")
from snaketron.graph import process

COMMANDS = {
    "well": "sleep 20",
    "killed": "[ {attempt} -gt 1 ] || sleep 600",
    "never": "true",  # begins in an hour; the second try at once
    "refused": "true",  # there is no such partition
    "full": 'python -c \'from snaketron import log; log.run(lambda: print(1, file=open("/dev/full", "w", 1)))\'',
    "long": "sleep 600",
    "outlasting": "until [ -e answered ]; do sleep 0.2; done",
}


onstart:
    process.obey_interrupts()


rule meet:
    output:
        "{fate}.txt",
    log:
        "logs/{fate}.log",
    resources:
        command=lambda wildcards, attempt: COMMANDS[wildcards.fate].format(
            attempt=attempt
        ),
        slurm_partition=lambda wildcards: (
            "nowhere" if wildcards.fate == "refused" else "tests"
        ),
        slurm_extra=lambda wildcards, attempt: (
            "--begin=now+1hour" if wildcards.fate == "never" and attempt == 1 else ""
        ),
    shell:
        "{{ {resources.command}; }} &> {log}; touch {output}"
