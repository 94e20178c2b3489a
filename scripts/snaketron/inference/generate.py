"""Continuations of texts, token by token, by a model in any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from snaketron.inference.decoder import READ_AT_ONCE, Decoder, decoding
from snaketron.model import backend
from snaketron.model.build import BuiltModel

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen among those that the model holds possible.

    temperature: divides the logits; 0 takes the most likely token.
    top_p: draws among the fewest tokens whose probabilities add up to it (Holtzman et al., arXiv 1904.09751).
    seed: of the draws. Each text of a call has draws of its own, whatever grows beside it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def draws(self, text: int) -> torch.Generator:
        """The random numbers of the text with this number."""
        return torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, text]).generate_state(1, np.uint64)[0] >> 1)
        )


GREEDY = Sampling()

# How an answer ended, in the words of OpenAI's interface, vLLM's and others: by a token that ends it, or cut.
type Finish = Literal["stop", "length"]


def finish_reason(ids: Sequence[int], stop: Collection[int]) -> Finish:
    """How an answer of `generate` ended.

    >>> finish_reason([5, 2], stop={2}), finish_reason([5, 6], stop={2})
    ('stop', 'length')
    """
    return "stop" if ids and ids[-1] in stop else "length"


def generate(
    built: BuiltModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Collection[int],
    ends: Callable[[], Callable[[int], bool]] = lambda: lambda _: False,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    together: bool = backend.HAS_GPU,
) -> list[list[int]]:
    """The ids that follow each prompt, up to the first one of `stop` (included) or `max_tokens` of them.

    `ends()` is called for each answer; what it returns is told each token, and says whether that is the last.
    A text also ends at the model's seq_length. Up to `batch_size` texts grow at the same time, and those that
    end make room for the next ones. Every rank must call this; all get the same ids.

    `together`: prompts of like lengths are read at once, as soon as a quarter of the rows is free. To start
    the kernels of a prompt of 256 tokens takes a host 0.12 s, in which an H200 could read 32 of them.
    """
    limits = [min(max_tokens, built.settings.seq_length - len(prompt)) for prompt in prompts]
    waiting = [number for number, limit in enumerate(limits) if limit > 0][::-1]
    answers: list[list[int]] = [[] for _ in prompts]
    if not waiting:
        return answers
    draws = [sampling.draws(number) for number in range(len(prompts))]
    is_last = [ends() for _ in prompts]

    def goes_on(number: int, token: int) -> bool:
        answers[number].append(token)
        return token not in stop and len(answers[number]) < limits[number] and not is_last[number](token)

    if together:
        waiting.sort(key=lambda number: len(prompts[number]))
    longest = max(len(prompts[number]) + limits[number] for number in waiting)
    with decoding(built, min(batch_size, len(waiting)), longest) as decoder:
        busy: dict[int, int] = {}  # the text that each row holds
        last = [0] * len(decoder.lengths)  # the last token of each row, which it has not read yet
        few = max(1, len(last) // 4) if together else 1

        def free() -> list[int]:
            return [row for row in range(len(last)) if row not in busy]

        while busy or waiting:
            if waiting and len(free()) >= min(few, len(waiting)):
                while waiting and (rows := free()):
                    group = _next_to_read(waiting, prompts, len(rows) if together else 1)
                    begun = dict(zip(rows, group, strict=False))
                    logits = decoder.begin({row: prompts[number] for row, number in begun.items()})
                    tokens = choose(logits, sampling, [draws[number] for number in group])
                    for (row, number), token in zip(begun.items(), tokens, strict=True):
                        last[row] = token
                        if goes_on(number, token):
                            busy[row] = number
                decoder.forget(*free())  # rows that stay without a text, which grow, too
            if not busy:
                break
            rows_draws = [draws[busy[row]] if row in busy else None for row in range(len(last))]
            last = choose(decoder.step(torch.tensor(last)), sampling, rows_draws)
            ended = [row for row, number in busy.items() if not goes_on(number, last[row])]
            for row in ended:
                del busy[row]
            decoder.forget(*ended)
    return answers


def _next_to_read(waiting: list[int], prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """Take from the end of `waiting` the texts that are read together: at most `most`, and one at least."""
    group, longest = [waiting.pop()], 0
    while waiting and len(group) < most:
        longest = max(longest, *(len(prompts[number]) for number in (group[-1], waiting[-1])))
        if (len(group) + 1) * longest > READ_AT_ONCE:
            break
        group.append(waiting.pop())
    return group


def continuation(
    decoder: Decoder,
    ids: Sequence[int],
    *,
    stop: Collection[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Read `ids` into the first row and give what follows, token by token, as `generate` does.

    The decoder has then read all tokens but the last one that was given.
    """
    draws, unread = [sampling.draws(0)], list(ids)
    for number in range(max_tokens):
        if number and (unread[0] in stop or decoder.lengths[0] == decoder.max_length):
            return
        unread = choose(decoder.read(0, unread), sampling, draws)
        yield unread[0]


def choose(logits: Tensor | None, sampling: Sampling, draws: Sequence[torch.Generator | None]) -> list[int]:
    """A token for each row of logits (rows, vocabulary), the same on all ranks; None for rows without draws.

    The logits are those of the last pipeline stage; other ranks have none. The last rank is in that stage.
    """
    tokens = torch.zeros(len(draws), dtype=torch.int64)
    if logits is not None:
        tokens = _drawn(logits, sampling, draws) if sampling.temperature > 0 else logits.argmax(-1)
    if torch.distributed.get_world_size() > 1:
        tokens = tokens.to(backend.device())
        torch.distributed.broadcast(tokens, src=torch.distributed.get_world_size() - 1)
    return tokens.tolist()


def _drawn(logits: Tensor, sampling: Sampling, draws: Sequence[torch.Generator | None]) -> Tensor:
    scores = logits.double().cpu()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # finite, however low it is
    probabilities, ids = scores.softmax(-1).sort(-1, descending=True)
    # A token stays if those before it do not reach top_p yet. The first one always stays.
    left_out = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    left_out[:, 0] = False
    probabilities = probabilities.masked_fill(left_out, 0.0)
    places = [
        0 if random is None else int(torch.multinomial(row, 1, generator=random))
        for row, random in zip(probabilities, draws, strict=True)
    ]
    return ids[torch.arange(len(places)), places]
