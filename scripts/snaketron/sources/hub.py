"""What the Hugging Face hub says of data sets and models: commits, files, sizes and hashes."""

from __future__ import annotations

import functools
import posixpath
import re
import tempfile

from snaketron.config import Hub
from snaketron.config.base import closest
from snaketron.log import UserError
from snaketron.sources.addresses import Found, list_files, readable
from snaketron.sources.formats import READABLE
from snaketron.sources.models import MODEL_FILE, TASK_FILE, HubRepository
from snaketron.sources.patience import Patience, ask
from snaketron.wording import some

_AT_A_TIME = 100  # paths of one question to the hub
_MOST = 50  # names in a message


def list_hub(hub: Hub, at: str, patience: Patience, max_files: int | None = None) -> tuple[str, list[Found]]:
    """The commit and the files of a split of a configuration, as the `datasets` library finds them.

    Both names must be exactly those of the data set. Only the first `max_files` are asked for. `at` is the
    place in the configuration. Raises `UserError`.
    """
    if not re.fullmatch(r"[^/@:]+/[^/@:]+", hub.repository):
        raise UserError(f"{at}.repository: {hub.repository!r} is not of the form OWNER/NAME")
    commit = _commit(hub.repository, hub.revision, at, patience)
    found = ask(
        functools.partial(_files_of_split, hub, commit, at),
        at=at,
        what=hub.repository,
        patience=patience,
        long=True,
    )
    prefix = f"hf://datasets/{hub.repository}@{commit}/"
    paths = sorted({file.removeprefix(prefix) for file in found})[:max_files]
    return commit, readable(_described(hub.repository, commit, paths, at, patience), at)


def _files_of_split(hub: Hub, commit: str, at: str) -> list[str]:
    import datasets
    from datasets.load import dataset_module_factory, get_dataset_builder_class, load_dataset_builder

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()  # its hints belong to other programs
    path = f"hf://datasets/{hub.repository}"  # a bare name might be a directory here
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache: from the user's own, the library would answer when the hub fails.
        module = dataset_module_factory(path, revision=commit, cache_dir=cache)
        builder = get_dataset_builder_class(module)
        names = list(builder.builder_configs) or ["default"]
        default = builder.DEFAULT_CONFIG_NAME or (names[0] if len(names) == 1 else None)
        configuration = hub.configuration or default
        if configuration is None:
            raise UserError(
                f"{at}.configuration: {hub.repository} has several; name one of {some(names, _MOST)}"
            )
        if configuration not in names:
            raise UserError(_unknown(f"{at}.configuration", configuration, names, hub.repository))
        resolved = load_dataset_builder(path, configuration, revision=commit, cache_dir=cache)
        splits = {str(split): list(files) for split, files in resolved.config.data_files.items()}
    if hub.split not in splits:
        of = f"{hub.repository}, configuration {configuration}"
        raise UserError(_unknown(f"{at}.split", hub.split, list(splits), of))
    return splits[hub.split]


def list_hub_address(
    address: str, at: str, patience: Patience, max_files: int | None = None
) -> tuple[str, list[Found]]:
    """The commit and the files of an address hf://datasets/OWNER/NAME[@REVISION]/PATH."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import parse_hf_uri

    try:
        parsed = parse_hf_uri(address)
    except ValueError as error:
        raise UserError(f"{at}: {address}: {error}") from None
    if parsed.type != "dataset":
        raise UserError(f"{at}: {address} is not of the form hf://datasets/OWNER/NAME[@REVISION]/PATH")
    commit = _commit(parsed.id, parsed.revision or "main", at, patience)
    root = f"datasets/{parsed.id}@{commit}"
    system = HfFileSystem()
    found = list_files(system, posixpath.join(root, parsed.path_in_repo), at, address, patience)
    if not found:
        raise UserError(f"{at}: no {READABLE} file at {address}")
    # Some versions of the client put the revision into the paths that they return, some do not.
    paths = {re.sub(rf"^datasets/{re.escape(parsed.id)}(@[^/]+)?/", "", name) for name in found}
    files = _described(parsed.id, commit, sorted(paths)[:max_files], at, patience)
    return commit, readable(files, at)


def list_repository(model: HubRepository, patience: Patience) -> tuple[str, list[Found]]:
    """The commit of a repository, and the files that are used of its kind.

    A model has files in its root that belong to a tokenizer or a checkpoint. A data set has files of rows,
    and the README.md that assigns them to configurations.
    """
    from huggingface_hub import HfApi

    repository, revision, at = model.request[model.kind], model.request["revision"], model.where
    commit = _commit(repository, revision, at, patience, kind=model.kind)
    names = ask(
        lambda: HfApi().list_repo_files(repository, revision=commit, repo_type=model.kind),
        at=at,
        what=repository,
        patience=patience,
        long=True,
    )
    used = MODEL_FILE if model.kind == "model" else TASK_FILE
    paths = sorted(name for name in names if re.fullmatch(used, name))
    if not any(model.wanted.fullmatch(path) for path in paths):
        raise UserError(
            f"{at}: {repository} at {revision} has none of the files that are needed; check both names"
        )
    return commit, _described(repository, commit, paths, at, patience, kind=model.kind)


def _commit(repository: str, revision: str, at: str, patience: Patience, kind: str = "dataset") -> str:
    """The commit that a branch, a tag or a commit is now."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # no hints on tokens and limits

    def answer() -> str:
        return str(HfApi().repo_info(repository, revision=revision, repo_type=kind).sha)

    return ask(answer, at=at, what=f"{repository} at {revision}", patience=patience)


def _described(
    repository: str, commit: str, paths: list[str], at: str, patience: Patience, kind: str = "dataset"
) -> list[Found]:
    """Sizes and hashes of files of a repository, which the hub knows for large files."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    root = f"hf://{'datasets/' if kind == 'dataset' else ''}{repository}@{commit}"
    known: dict[str, RepoFile] = {}
    for i in range(0, len(paths), _AT_A_TIME):
        infos = ask(
            functools.partial(
                HfApi().get_paths_info, repository, paths[i : i + _AT_A_TIME], repo_type=kind, revision=commit
            ),
            at=at,
            what=repository,
            patience=patience,
        )
        known |= {info.path: info for info in infos if isinstance(info, RepoFile)}
    missing = [path for path in paths if path not in known]
    if missing:
        raise UserError(f"{at}: the hub does not know {missing[0]} of {repository} at {commit}; try again")
    return [
        Found(f"{root}/{path}", path, info.size, info.lfs.sha256)
        if info.lfs
        else Found(f"{root}/{path}", path, info.size, etag=info.blob_id)
        for path, info in ((path, known[path]) for path in paths)
    ]


def _unknown(at: str, name: str, known: list[str], of: str) -> str:
    close = closest(name, known)
    hint = f"; did you mean {close!r}?" if close else "."
    return f"{at}: {of} has no {name!r}{hint} There are {some(known, _MOST)}"
