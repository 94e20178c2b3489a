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
        download_mb=graph.download_mb,
        downloads=1,
    params:
        size=graph.download_size,
        sha256=graph.download_sha256,
    shell:
        "python scripts/download.py --address {resources.address:q} --size {params.size:q}"
        " --sha256 {params.sha256:q} --name {wildcards.source:q}/{wildcards.file:q}"
        " --output {output.file:q} --record {output.record:q} --log-file {log:q}"


rule download_model:
    """Download one file of a hub model (a tokenizer or a checkpoint) of the lock file, as rule download does."""
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
    resources:
        address=graph.download_address,
        download_mb=graph.download_mb,
        downloads=1,
    params:
        size=graph.download_size,
        sha256=graph.download_sha256,
    shell:
        "python scripts/download.py --address {resources.address:q} --size {params.size:q}"
        " --sha256 {params.sha256:q} --name {wildcards.owner:q}/{wildcards.model:q}/{wildcards.file:q}"
        " --output {output.file:q} --record {output.record:q} --log-file {log:q}"
