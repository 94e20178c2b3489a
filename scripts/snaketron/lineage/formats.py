"""The lineage of an artifact for other programs: JSON of our own, and OpenLineage's events."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta
from typing import Any

from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.record import Entry

PRODUCER = "urn:snaketron:lineage"  # OpenLineage asks for a URI
EVENT = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
VERSION_FACET = (
    "https://openlineage.io/spec/facets/1-0-1/DatasetVersionDatasetFacet.json"
    "#/$defs/DatasetVersionDatasetFacet"
)
NAMESPACE = uuid.UUID("6f0e1bb1-6b1c-4e5c-9d0a-0d5c3f1f7c2e")  # of the identities of runs


def as_json(catalogue: Catalogue, made: Made) -> dict[str, Any]:
    """All records behind an artifact, its own last, and for each input the record of what made it."""
    records = []
    for one in catalogue.ancestors(made):
        value = one.record.as_json()
        for entry, listed in zip(one.record.inputs, value["inputs"], strict=True):
            maker = catalogue.made_by(entry, one)
            listed["made_by"] = str(maker.path) if maker else None
        records.append({"record": str(one.path), **value})
    return {"artifact": str(made.path), "records": records}


def openlineage(catalogue: Catalogue, made: Made) -> list[dict[str, Any]]:
    """The `START` and the `COMPLETE` event, which the specification demands, of each job behind an artifact.

    The jobs are in an order in which they may have run.
    """
    return [event for one in catalogue.ancestors(made) for event in _events(catalogue, one)]


def _events(catalogue: Catalogue, made: Made) -> list[dict[str, Any]]:
    inputs: list[Entry] = []
    for entry in made.record.inputs:
        maker = catalogue.made_by(entry, made)
        # A job names the record of a shard, or a checkpoint; it used all that they consist of.
        inputs += maker.record.outputs if maker and _is_whole(maker, entry) else [entry]
    ended = datetime.fromisoformat(made.record.created)
    began = ended - timedelta(seconds=made.record.seconds)
    event = {
        "producer": PRODUCER,
        "schemaURL": EVENT,
        "run": {"runId": str(uuid.uuid5(NAMESPACE, made.digest))},
        "job": {"namespace": "snaketron", "name": f"{made.record.kind}/{made.record.name}"},
    }
    data = {
        "inputs": [_data_set(entry) for entry in inputs],
        "outputs": [_data_set(entry) for entry in made.record.outputs],
    }
    return [
        {"eventType": "START", "eventTime": began.isoformat(), **event},
        {"eventType": "COMPLETE", "eventTime": ended.isoformat(), **event, **data},
    ]


def _is_whole(maker: Made, entry: Entry) -> bool:
    """Whether an input stands for all outputs of the job that made it."""
    return bool(entry.version) or maker.digest == entry.sha256


def _data_set(entry: Entry) -> dict[str, Any]:
    facet = {"_producer": PRODUCER, "_schemaURL": VERSION_FACET, "datasetVersion": entry.identity}
    return {"namespace": "file", "name": entry.path, "facets": {"version": facet} if entry.identity else {}}
