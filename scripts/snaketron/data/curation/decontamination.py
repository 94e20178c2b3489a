"""Documents that share an n-gram of words with an evaluation: datatrove's index and filter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from snaketron.data import curation
from snaketron.data.curation import lists
from snaketron.data.curation.documents import Removed
from snaketron.data.curation.folder import Folder
from snaketron.data.curation.words import learn, simplify_text
from snaketron.data.rows import read_texts
from snaketron.lineage.record import Record, making, of_user
from snaketron.log import UserError, logger

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont import n_grams
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer
from datatrove.utils.typeshelper import Languages

REASON = "contaminated"


def hashes(texts: Iterable[str], n: int) -> tuple[np.ndarray, int, int]:
    """datatrove's hashes of the n-grams of texts, sorted; the number of texts and of those too short for one.

    datatrove's step asks for `lighteval`, which it needs for lists of tasks only. So the step is made without
    that check, and only its function is called.
    """
    indexer = object.__new__(NGramsDecontIndexer)
    NGramsDecontIndexer.__init__(indexer, Folder(), config=NGramsDecontConfig(n_grams=n))
    found: set[int] = set()
    num_texts = too_short = 0
    for text in texts:
        hashed = indexer.compute_hashes(text)
        num_texts += 1
        too_short += not hashed
        found.update(hashed)
    return np.array(sorted(found), dtype=np.uint64), num_texts, too_short


def decontamination_index(
    texts: Sequence[Path], *, text_field: str, n: int, output: Path, record: Path
) -> Record:
    """Write the hashes of the n-grams of each file of evaluation texts."""
    curation.quiet()
    learn(Languages.english)
    outputs = {"index": output}
    with making("decontamination_index", output.stem, outputs=outputs, record=record) as job:
        index: dict[str, np.ndarray] = {}
        counts: dict[str, Any] = {}
        for path in texts:
            found, num_texts, too_short = hashes((text for _, text in read_texts(path, text_field)), n)
            if not len(found):
                raise UserError(f"{path}: no text of {n} words to protect; correct curation.evaluation")
            if too_short:
                logger.warning("%s: %d of %d texts are shorter than %d words", path, too_short, num_texts, n)
            index[str(path)] = found
            counts[str(path)] = {"texts": num_texts, "too_short": too_short, "n_grams": len(found)}
        about = {"kind": "decontamination_index", "n": n}
        lists.write(job.aside["index"], index, np.uint64, about)
        job.inputs, job.counts = {"text": map(of_user, texts)}, counts
        job.settings = {"n": n, "text_field": text_field}
    return job.record


class Contaminated(Removed):
    """Takes the removed documents, and names the evaluation and the n-gram."""

    def write(self, document: Document, rank: int = 0) -> None:
        found = document.metadata
        self.tally.remove(
            document, f"{REASON}: {found['contaminated_task']}", detail=found["contaminated_ngram"]
        )


def decontamination_filter(path: Path, n: int, removed: Contaminated) -> NGramsDecontFilter:
    """datatrove's filter with the index of a file."""
    learn(Languages.english)
    index = lists.Lists(path)
    if index.about["n"] != n:
        raise UserError(f"{path}: of {index.about['n']} words, not {n}; delete it and run again")
    folder = Folder({f"{name}.index.hashes": index[name].tobytes() for name in index.names})
    n_grams.simplify_text = simplify_text  # faster, with the same result
    block = NGramsDecontFilter(folder, NGramsDecontConfig(n_grams=n), exclusion_writer=removed)
    block.load_index_hashes()
    if block._index_hashes.keys() != {value for name in index.names for value in index[name].tolist()}:
        # Without the index it would let all documents pass.
        raise RuntimeError(f"{path}: datatrove did not load all of the index")
    return block
