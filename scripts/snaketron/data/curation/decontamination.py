"""Documents that share an n-gram of words with an evaluation: datatrove's index and filter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.data import curation
from snaketron.data.curation import lists
from snaketron.data.curation.documents import Removed
from snaketron.data.curation.folder import Folder
from snaketron.data.curation.words import learn, simplify_text
from snaketron.data.rows import read_texts
from snaketron.lineage.record import Opened, Record, making
from snaketron.log import UserError, logger
from snaketron.settings.text import EvaluationTextSettings
from snaketron.wording import plural

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont import n_grams
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer
from datatrove.utils.text import ngrams
from datatrove.utils.typeshelper import Languages

REASON = "contaminated"
IGNORED = "ignored"  # the list of the n-grams that do not count; the others have the path of a file
NUMBER = "0"  # what datatrove's normalization writes for every number


class Index(NamedTuple):
    """The n-grams of the texts of an evaluation."""

    hashes: np.ndarray  # datatrove's, sorted
    num_texts: int
    too_short: int  # texts of fewer words than an n-gram
    unprotected: int  # texts that are long enough, and have no n-gram that counts
    ignored: np.ndarray  # hashes of the n-grams that do not count, sorted


def telling(n_gram: Sequence[str]) -> bool:
    """Whether an n-gram is of one text rather than of any: half of its words must be different words.

    datatrove writes each number as 0, so twelve numbers in a row are the same n-gram in every table.
    Published decontamination has the same trouble: GPT-3 (Brown et al. 2020, appendix C), and NeMo Curator
    after it, ignore n-grams that are in more than ten documents of the training data. Our shards are jobs
    that do not know one another, so the n-gram itself decides, and numbers are no words.
    """
    return 2 * len(set(n_gram) - {NUMBER}) >= len(n_gram)


def index_of(texts: Iterable[str], n: int) -> Index:
    """The hashes of the n-grams of texts that count.

    datatrove's step asks for `lighteval`, which it needs for lists of tasks only. So the step is made without
    that check, and its word tokenizer and hash function are used.
    """
    indexer = object.__new__(NGramsDecontIndexer)
    NGramsDecontIndexer.__init__(indexer, Folder(), config=NGramsDecontConfig(n_grams=n))
    found: set[int] = set()
    ignored: set[tuple[str, ...]] = set()
    num_texts = too_short = unprotected = 0
    for text in texts:
        words = indexer.tokenizer.word_tokenize(simplify_text(text, indexer.config.norm_config))
        n_grams = set(ngrams(words, n))
        counting = {n_gram for n_gram in n_grams if telling(n_gram)}
        found.update(indexer.hash_func(" ".join(n_gram)) for n_gram in counting)
        ignored |= n_grams - counting
        num_texts += 1
        too_short += not n_grams
        unprotected += bool(n_grams) and not counting
    overlooked = {indexer.hash_func(" ".join(n_gram)) for n_gram in ignored}
    hashes, uncounted = (np.array(sorted(one), dtype=np.uint64) for one in (found, overlooked))
    return Index(hashes, num_texts, too_short, unprotected, uncounted)


def decontamination_index(
    texts: Sequence[Path], *, text_field: str, n: int, output: Path, record: Path
) -> Record:
    """Write the hashes of the n-grams of each file of evaluation texts."""
    curation.quiet()
    learn(Languages.english)
    outputs = {"index": output}
    with making("decontamination_index", output.stem, outputs=outputs, record=record) as job:
        index: dict[str, np.ndarray] = {}
        ignored: list[np.ndarray] = []
        counted: dict[str, Any] = {}
        opened = Opened()
        for path in texts:
            opened.note(path)
            made = index_of((text for _, text in read_texts(path, text_field, EvaluationTextSettings())), n)
            if not len(made.hashes):
                raise UserError(
                    f"{path}: no text of {n} words to protect (half of them must be different words, and no "
                    "numbers); correct curation.evaluation"
                )
            index[str(path)] = made.hashes
            ignored.append(made.ignored)
            counted[str(path)] = _say(path, made, n)
        index[IGNORED] = np.unique(np.concatenate(ignored))
        about = {"kind": "decontamination_index", "n": n}
        lists.write(job.aside["index"], index, np.uint64, about)
        job.inputs, job.counts = {"text": opened.entries()}, counted
        job.settings = {"n": n, "text_field": text_field}
    return job.record


def _say(path: Path, made: Index, n: int) -> dict[str, int]:
    """Warn of what an index does not protect; its counts for the record."""
    if made.too_short:
        logger.warning(
            "%s: %d of %d texts are shorter than %d words", path, made.too_short, made.num_texts, n
        )
    if len(made.ignored):
        logger.warning(
            "%s: %s of numbers and few different words, which many documents share, are ignored; "
            "%d of %d texts have no others and are not protected",
            *(path, plural(len(made.ignored), "n-gram"), made.unprotected, made.num_texts),
        )
    return {
        "texts": made.num_texts,
        "too_short": made.too_short,
        "unprotected": made.unprotected,
        "n_grams": len(made.hashes),
        "ignored": len(made.ignored),
    }


class Contaminated(Removed):
    """Takes the removed documents, and names the evaluation and the n-gram."""

    def write(self, document: Document, rank: int = 0) -> None:
        found = document.metadata
        self.tally.remove(
            document, f"{REASON}: {found['contaminated_task']}", detail=found["contaminated_ngram"]
        )


class _Hashes(dict[int, str]):
    """The n-grams of an index with the file of each. Notes when it was asked for one that does not count."""

    ignored: frozenset[int]
    asked = False

    def get(self, key: int, default: Any = None) -> Any:
        self.asked = self.asked or key in self.ignored
        return super().get(key, default)


class Filter(NGramsDecontFilter):  # type: ignore[misc]
    """datatrove's filter. It also counts the documents that only n-grams which do not count would remove."""

    _index_hashes: dict[int, str]

    def __init__(self, folder: Folder, n: int, removed: Contaminated, ignored: Iterable[int]) -> None:
        super().__init__(folder, NGramsDecontConfig(n_grams=n), exclusion_writer=removed)
        self.load_index_hashes()
        self.hashes = _Hashes(self._index_hashes)
        self.hashes.ignored = frozenset(ignored)
        if self.hashes.ignored:
            self._index_hashes = self.hashes
        self.tally = removed.tally

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        self.hashes.asked = False
        found: bool | tuple[bool, str] = super().filter(document)
        if found is True and self.hashes.asked:
            self.tally.overlook(document)
        return found


def decontamination_filter(path: Path, n: int, removed: Contaminated) -> Filter:
    """The filter with the index of a file."""
    learn(Languages.english)
    index = lists.Lists(path)
    if index.about["n"] != n:
        raise UserError(f"{path}: of {index.about['n']} words, not {n}; delete it and run again")
    hashes = {name: index[name] for name in index.names if name != IGNORED}
    folder = Folder({f"{name}.index.hashes": found.tobytes() for name, found in hashes.items()})
    n_grams.simplify_text = simplify_text  # faster, with the same result
    block = Filter(folder, n, removed, index[IGNORED].tolist())
    if block.hashes.keys() != {value for found in hashes.values() for value in found.tolist()}:
        # Without the index it would let all documents pass.
        raise RuntimeError(f"{path}: datatrove did not load all of the index")
    return block
