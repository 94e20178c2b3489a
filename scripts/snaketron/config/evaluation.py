"""What is asked of finished checkpoints."""

from __future__ import annotations

from snaketron.config.base import Count, Positive, Section, Text, key
from snaketron.config.cluster import Parallel
from snaketron.config.training import CpusPerTask, MemGbPerTask

from pydantic import Field


class Task(Section):
    """A task of lm-eval's harness."""

    name: Text = Field(description="name of a task or a group of tasks, such as hellaswag or mmlu")
    num_fewshot: Count | None = key(None, "solved examples before each question; null: what the task says")
    data: Text | None = key(
        None,
        "its data set: a directory as it is downloaded from the hub, or OWNER/NAME or OWNER/NAME@REVISION of "
        "the hub, which lock_sources pins; null: the task's own files, or the cache of the hub",
    )


class Evaluation(Section):
    text_tokens: Count = key(16_000, "tokens of the test split of each corpus whose loss is computed")
    chat_packs: Count = key(16, "packs of the test split of each source of chats whose loss is computed")
    answers: Count = key(32, "held-out answers of each source of chats that are generated and compared")
    answer_tokens: Positive = key(256, "longest answer")
    tasks: list[Task] = key(list, "tasks of lm-eval's harness; they need the extra `eval`, and no network")
    task_directories: list[Text] = key(list, "directories with tasks of your own, in lm-eval's YAML")
    task_limit: Positive | None = key(None, "questions of each task; null: all")
    apply_chat_template: bool = key(False, "ask the tasks' questions in the chat template")
    batch_size: Positive = key(8, "texts that one process computes at a time")
    cpus_per_task: CpusPerTask = 1
    mem_gb_per_task: MemGbPerTask = 4
    parallel: Parallel = key(Parallel, "how many processes share the model, in any layout")
