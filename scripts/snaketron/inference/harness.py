"""A checkpoint as a model of lm-eval's harness, without a conversion: any task, in any layout.

Requests are answered as lm-eval's own `hf` model answers them: the same tokens, the same windows, the same
ends; so a checkpoint and its export give the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from snaketron.config.base import closest
from snaketron.config.evaluation import Task
from snaketron.data.chats.template import Template
from snaketron.data.chats.unusable import Unusable
from snaketron.inference.generate import Sampling, generate
from snaketron.inference.pieces import Ends
from snaketron.inference.score import score
from snaketron.log import UserError, first_line
from snaketron.model.build import BuiltModel
from snaketron.report.evaluations import plain_numbers

import datasets.config
import huggingface_hub.constants
import lm_eval
import lm_eval.evaluator
import tqdm
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager, _yaml_loader
from lm_eval.tasks._index import Kind
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

MAX_TOKENS = 256  # of an answer, where the task does not say; that of lm-eval's `hf`
# What `generation_kwargs` of a task may hold, as lm-eval spells it; and values that change nothing.
_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
_WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "top_k": 0, "min_p": 0}
# What lm-eval raises where a YAML file does not fit its rows.
_FAULTS = (LookupError, TypeError, ValueError, StopIteration, TemplateError)


class CheckpointLM(TemplateLM):
    """Every rank must run the same tasks; all get the same results.

    ends: ids that end an answer. The first one ends a text too.
    begin: the token that begins a text, if the tokenizer has one. It stands before a text that has no
        beginning, in whose place the first end does where there is none.
    """

    def __init__(
        self,
        built: BuiltModel,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        template: Template,
        batch_size: int,
        begin: str | None,
    ) -> None:
        super().__init__()
        self.built, self._tokenizer, self._ends = built, tokenizer, ends
        self._template, self._batch_size = template, batch_size
        self._begin = None if begin is None else tokenizer.token_to_id(begin)

    @property
    def eot_token_id(self) -> int:
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._begin is None else self._begin

    @property
    def max_length(self) -> int:
        return self.built.settings.seq_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # a template may have written the beginning
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    @property
    def tokenizer_name(self) -> str:
        return "checkpoint"

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        # Without the prompt of an answer, a task has begun the answer.
        write = self._template.prompt if add_generation_prompt else self._template.begun
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return write(chat_history)
        except Unusable as error:
            if len(others) == len(chat_history):
                raise UserError(
                    f"eval.apply_chat_template: the chat template cannot write a question: {error}"
                ) from None
            return self.apply_chat_template(others, add_generation_prompt)  # as `hf` does

    # ----------------------------------------------------------------------------------- requests

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log probability, whether it is what the model would say) of each continuation."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:  # `hf` refuses it, too
            raise UserError(
                f"eval.tasks: a text of {longest} tokens has no score: the model was trained on up to "
                f"{self.max_length}; leave out the task that has it"
            )
        texts = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found = []
        scores = score(self.built, texts, batch_size=self._batch_size)
        for request, (nats, likeliest) in zip(requests, scores, strict=True):
            asked = slice(len(nats) - len(request[2]), None)
            found.append((-float(nats[asked].sum()), bool(likeliest[asked].all())))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, in windows that score each token once."""
        windows = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(number, *make_disjoint_window(part)) for part in parts]
        texts = [(("", ""), list(context), list(continuation)) for _, context, continuation in windows]
        totals = [0.0] * len(requests)
        for (number, _, _), (logarithm, _) in zip(windows, self._loglikelihood_tokens(texts), strict=True):
            totals[number] += logarithm
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or drawn answers, up to the first of the texts that the task says end them."""
        alike: dict[str, list[int]] = {}  # requests that may grow together, by their options
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for options, numbers in alike.items():
            contexts = [str(requests[number].args[0]) for number in numbers]
            for number, text in zip(numbers, self._generate(contexts, json.loads(options)), strict=True):
                answers[number] = text
        return answers

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs  # 2 s, which other kinds of tasks do not need

        asked = dict(normalize_gen_kwargs(options, MAX_TOKENS))
        _check_options(asked)
        ends = [text for text in asked["until"] if text]
        most = asked["max_gen_toks"]
        if most >= self.max_length:  # `hf` refuses it, too
            raise UserError(
                f"eval.tasks: answers of up to {most} tokens leave no room for a question: the model was "
                f"trained on up to {self.max_length}; give the task a lower max_gen_toks"
            )
        sampling = Sampling(
            temperature=asked["temperature"] if asked["do_sample"] else 0.0,
            top_p=float(asked.get("top_p", 1.0)),
        )
        found = generate(
            self.built,
            [
                self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
                for context in contexts
            ],
            stop=self._ends,
            ends=lambda: Ends(self._tokenizer, ends).add,
            max_tokens=most,
            sampling=sampling,
            batch_size=self._batch_size,
        )
        return [_before(self._decode(ids), ends) for ids in found]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _check_options(asked: Mapping[str, Any]) -> None:
    """`UserError` for options that would be passed over, so that `hf` would give other answers."""
    unknown = [
        f"{name}: {value}"
        for name, value in asked.items()
        if name not in _OPTIONS and value is not None and value != _WITHOUT_EFFECT.get(name)
    ]
    if unknown:
        raise UserError(
            f"eval.tasks: generation_kwargs of a task has {', '.join(unknown)}; answers are made with "
            f"{', '.join(sorted(_OPTIONS))} alone. Take it out of the task, or ask the export with lm_eval"
        )


def _before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of its ends."""
    for end in ends:
        text = text.partition(end)[0]
    return text


@contextlib.contextmanager
def _offline(*, cached: bool) -> Iterator[None]:
    """Have the libraries of the hub ask nobody: they read their environment once, when they are imported.

    The cache of `datasets` 5.2 has the rows that a directory held when it was first read, whatever it holds
    now. Unless `cached`, it is empty here.
    """
    hub: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    with tempfile.TemporaryDirectory() as empty, contextlib.ExitStack() as replaced:
        for module in hub:
            replaced.enter_context(mock.patch.object(module, "HF_HUB_OFFLINE", True))
        if not cached:
            replaced.enter_context(mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(empty)))
        yield


@contextlib.contextmanager
def _unasked() -> Iterator[None]:
    """Keep lm-eval from asking git and the machine, in 1.6 s, for what the record of the evaluation says.

    Where there is no repository, git's `fatal: not a git repository` stood among the lines of the run. So did
    the progress bars of lm-eval and `datasets`, which want a terminal of their own.
    """
    make = tqdm.tqdm.__init__

    def hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        make(bar, *arguments, **options | {"disable": True})

    with (
        mock.patch.object(tqdm.tqdm, "__init__", hidden),
        mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None),
        mock.patch.object(lm_eval.evaluator, "add_env_info", lambda results: None),
    ):
        yield


@functools.cache
def task_manager(name: str, directories: tuple[str, ...]) -> TaskManager:
    """The tasks among which one is found. Reading lm-eval's own 14,000 files takes 10 s; it is done once.

    A task of the user's directories needs none of them, and a group may have members that are lm-eval's.
    """
    if directories:
        own = TaskManager(include_path=list(directories), include_defaults=False)
        if (entry := own.task_index.get(name)) and entry.kind is Kind.TASK:
            return own
    return _all_tasks(directories)


@functools.cache
def _all_tasks(directories: tuple[str, ...]) -> TaskManager:
    """Every second file that lm-eval reads is one that another includes: here each of those is read once."""
    read = functools.cache(_yaml_loader.load_yaml)

    def included(path: Any, *, resolve_func: bool, **_: Any) -> dict[str, Any]:
        return dict(read(path, resolve_func=resolve_func))

    with mock.patch.object(_yaml_loader, "load_yaml", included):
        return TaskManager(include_path=list(directories) or None)


def run_task(
    model: CheckpointLM,
    task: Task,
    *,
    directories: Sequence[Path] = (),
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, dict[str, Any]]:
    """The metrics of a task, or of each task of a group: {task: {metric: value, "questions": n}}.

    Raises `UserError` when the task is not known, or its data is not on this machine.
    """
    manager = task_manager(task.name, tuple(map(str, directories)))
    if task.name not in manager.task_index:
        where = f" nor in {', '.join(map(str, directories))}" if directories else ""
        close = closest(task.name, manager.task_index, cutoff=0.75)
        meant = f"; did you mean {close!r}?" if close else ""
        raise UserError(f"eval.tasks: {task.name} is no task of lm-eval {lm_eval.__version__}{where}{meant}")
    try:
        with _offline(cached=task.data is None), _unasked():
            found = lm_eval.simple_evaluate(
                model,
                tasks=_made(task, manager),
                num_fewshot=task.num_fewshot,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=apply_chat_template,
                log_samples=False,
                task_manager=manager,
            )
    except _FAULTS as error:
        if _is_of_model(error):
            raise
        raise UserError(
            f"eval.tasks: {task.name} fails in lm-eval ({type(error).__name__}: {error}); compare its YAML "
            "and num_fewshot with its rows"
        ) from error
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"eval.tasks: the data of {task.name} is not on this machine ({first_line(error)}); "
            "download its data set on a machine with a network, and name the directory as `data` of the task"
        ) from None
    assert found is not None  # None is for ranks that lm-eval knows of
    return {
        name: plain_numbers(metrics) | {"questions": found["n-samples"].get(name, {}).get("effective")}
        for name, metrics in found["results"].items()
    }


def _is_of_model(error: BaseException) -> bool:
    """Whether it was raised where lm-eval asks the model."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(isinstance(frame.f_locals.get("self"), CheckpointLM) for frame in frames)


def _made(task: Task, manager: TaskManager) -> list[Any]:
    """The task, or those of its group or tag, with the data that it names."""
    if task.data and not Path(task.data).is_dir():
        raise UserError(f"eval.tasks: {task.name}: {task.data} is no directory")
    try:
        # The manager passes nothing on to a task that it knows by name; what builds them does.
        made: Any = manager._factory.build(
            manager.task_index[task.name],
            overrides={"dataset_path": task.data} if task.data else None,
            registry=manager.task_index,
        )
    except (ConnectionError, FileNotFoundError):
        raise
    except (*_FAULTS, DatasetsError) as error:
        raise UserError(
            f"eval.tasks: {task.name} cannot be made of its data ({type(error).__name__}: {error}); compare "
            "the keys of its YAML with the first row"
        ) from error
    return made if isinstance(made, list) else [made]
