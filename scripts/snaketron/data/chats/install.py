"""Check a chat template, of a file or of a Hugging Face tokenizer, and put it beside the tokenizer."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from snaketron.data.chats.probes import ANSWER, PROBE
from snaketron.data.chats.template import Template, read_source
from snaketron.data.chats.unusable import Unusable
from snaketron.data.tokenizer import from_hugging_face, origin
from snaketron.lineage.record import Record, making, of_user
from snaketron.log import UserError, logger
from snaketron.settings.tokenizer import TemplateSettings

# What stands for the special tokens while a template is tried.
_VARIABLES = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}

# Bytes and seconds that trying a template may take, which takes a few megabytes and milliseconds.
ROOM, PATIENCE_S = 1_000_000_000, 60.0


def install_template(settings: TemplateSettings, *, output: Path, record: Path) -> Record:
    """Check the chat template of a file, or of a Hugging Face tokenizer, and write it to `output`."""
    with making("chat_template", output.name, outputs={"template": output}, record=record) as job:
        if name := settings.chat_template:
            text = read_source(Path(name), "tokenizer.chat_template")
            job.inputs = {"template": of_user(Path(name))}
        else:
            assert settings.path
            text, name = template_of(settings.path), settings.path
            beside = Path(name) / "chat_template.jinja"
            job.inputs = {"origin": [*origin(name), *([beside] if beside.is_file() else [])]}
        with _limits(name):
            check_template(text, name)
        job.aside["template"].write_text(text, encoding="utf-8")
        job.counts = {"characters": len(text)}
    return job.record


def template_of(source: str) -> str:
    """The chat template that comes with a Hugging Face tokenizer."""
    template = from_hugging_face(source).chat_template
    if isinstance(template, dict):
        if others := sorted(template.keys() - {"default"}):
            logger.warning(
                "%s: the chat template `default` is taken, and not %s; name another one in "
                "tokenizer.chat_template",
                source,
                ", ".join(others),
            )
        template = template.get("default")
    if not template:
        raise UserError(
            f"tokenizer.path {source}: no chat template; set tokenizer.chat_template to a Jinja file"
        )
    return str(template)


def check_template(text: str, name: str) -> None:
    """Check that a template renders a conversation and marks what the assistant says; `UserError` if not."""
    template = Template(text, name=name, variables=_VARIABLES)
    before, tools, arguments = next(template.probes())
    try:
        rendered, spans, *_ = template.render([*before, PROBE[1]], tools, arguments)
    except Unusable as error:
        raise UserError(f"{name}: cannot render a question and an answer: {error}") from None
    if not any(ANSWER in rendered[start:end] for start, end in spans):
        raise UserError(
            f"{name}: the assistant's answer is outside {{% generation %}} ... {{% endgeneration %}}; "
            "put these marks around it"
        )
    if template.marked:
        template.check_marks()


@contextlib.contextmanager
def _limits(name: str) -> Iterator[None]:
    """Refuse a template that takes ever more memory or time: jinja2's sandbox limits neither.

    A template of the hub may hold `"a" * 10 ** 10`, or loops in loops.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + ROOM
    if before[0] == resource.RLIM_INFINITY or before[0] > most:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    handler = signal.signal(signal.SIGALRM, _is_over)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S, 1.0)  # again, as jinja2 may have caught the first
    try:
        yield
    except MemoryError:
        raise UserError(f"{name}: takes more than {ROOM / 1e9:g} GB of memory for {_TRIED}") from None
    except TimeoutError:
        raise UserError(f"{name}: takes more than {PATIENCE_S:g} s for {_TRIED}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


_TRIED = "a question and an answer; look for texts that are repeated and for loops in loops"


def _is_over(number: int, frame: FrameType | None) -> None:
    raise TimeoutError
