rule download:
    """Download one file of the lock file, continue a partial one, and verify size and hash."""
    output:
        file="<data>/raw/{source}/{file}",
        record="<data>/raw/{source}/{file}.json",
    log:
        "<logs>/download/{source}/{file}.log",
    benchmark:
        "<benchmarks>/download/{source}/{file}.tsv"
    wildcard_constraints:
        file=DOWNLOADED,
    resources:
        # A file may move to another address without changing, so the address is no parameter.
        address=graph.download_address,
        artifact=graph.download_name,
        download_mb=graph.download_mb,
        downloads=1,
    params:
        size=graph.download_size,
        sha256=graph.download_sha256,
    shell:
        "python scripts/download.py --address {resources.address:q} --size {params.size:q}"
        " --sha256 {params.sha256:q} --name {resources.artifact:q}"
        " --output {output.file:q} --record {output.record:q} --log-file {log:q}"


# One file of a hub model, a tokenizer or a checkpoint.
use rule download as download_model with:
    output:
        file="<data>/hub/{owner}/{model}/{file}",
        record="<data>/hub/{owner}/{model}/{file}.json",
    log:
        "<logs>/download_model/{owner}/{model}/{file}.log",
    benchmark:
        "<benchmarks>/download_model/{owner}/{model}/{file}.tsv"
    wildcard_constraints:
        owner=r"[^/]+",
        model=r"[^/]+",
        file=MODEL_FILE,


# One file of a data set that a task of the evaluation asks from. The record lies in a hidden directory: whoever reads
# the data set takes all files that are not hidden.
use rule download as download_task_data with:
    output:
        file="<data>/hub/datasets/{owner}/{dataset}@{commit}/{file}",
        record="<data>/hub/datasets/{owner}/{dataset}@{commit}/.records/{file}.json",
    log:
        "<logs>/download_task_data/{owner}/{dataset}@{commit}/{file}.log",
    benchmark:
        "<benchmarks>/download_task_data/{owner}/{dataset}@{commit}/{file}.tsv"
    wildcard_constraints:
        owner=r"[^/]+",
        dataset=r"[^/@]+",
        commit=r"[^/@]+",
        file=TASK_FILE,
