"""Evaluate a checkpoint: losses of the test splits, exact answers, tasks of lm-eval's harness."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.jobs import launch, supervisor
from snaketron.log import argument_parser, run
from snaketron.settings import read_settings
from snaketron.settings.evaluation import EvalSettings
from snaketron.settings.training import RunSettings


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as ckpt/sft")
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="blend.json of phases of pretraining"
    )
    parser.add_argument("--chats", type=Path, help="blend.json of SFT")
    parser.add_argument("--settings", required=True, help="JSON of EvalSettings: what is measured")
    parser.add_argument("--run-settings", required=True, help="JSON of RunSettings: how it is run")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file to write, such as eval/sft.json"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.inference.evaluation import Evaluation, evaluate

    if launch.is_rank():
        launch.join()
    settings = read_settings(EvalSettings, args.settings)
    run_settings = read_settings(RunSettings, args.run_settings, "--run-settings")
    job = Evaluation(settings, run_settings, args.checkpoint, args.text, args.chats, args.output)
    if launch.is_rank():
        with launch.telling(job.version.failures):
            return evaluate(job)
    status = supervisor.supervise(f"eval/{job.settings.stage}", job.version, job.run, saved=job.parts_done)
    if status == 0:
        job.publish()
    return status


if __name__ == "__main__":
    run(main)
