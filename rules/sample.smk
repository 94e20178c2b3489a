rule sample_corpus:
    """Write a part of the sample: text and code that ship with Python, or requests and conversations that are made up."""
    output:
        files=expand("data/sample/{{name}}/part_{part}.jsonl", part=range(3)),
        record="data/sample/{name}/record.json",
    log:
        "<logs>/sample_corpus/{name}.log",
    benchmark:
        "<benchmarks>/sample_corpus/{name}.tsv"
    wildcard_constraints:
        name="docs|code|packages|requests",
    priority: 1
    shell:
        "python scripts/write_sample.py --name {wildcards.name:q}"
        " --files {output.files:q} --record {output.record:q} --log-file {log:q}"


# Conversations about the standard library, or with requests that call tools: no pretraining waits for them.
use rule sample_corpus as sample_chat with:
    output:
        files=expand("data/sample/{{name}}/part_{part}.jsonl", part=range(2)),
        record="data/sample/{name}/record.json",
    log:
        "<logs>/sample_chat/{name}.log",
    benchmark:
        "<benchmarks>/sample_chat/{name}.tsv"
    wildcard_constraints:
        name="questions|tools",
    priority: 0
