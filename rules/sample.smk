rule sample_corpus:
    """Write a corpus: documentation and code that ship with Python, or requests that are made up."""
    output:
        texts=expand("data/sample/{{corpus}}/part_{part}.jsonl", part=range(3)),
        record="data/sample/{corpus}/record.json",
    log:
        "<logs>/sample_corpus/{corpus}.log",
    benchmark:
        "<benchmarks>/sample_corpus/{corpus}.tsv"
    wildcard_constraints:
        corpus="docs|code|packages|requests",
    priority: 1
    shell:
        "python scripts/sample_corpus.py --corpus {wildcards.corpus:q}"
        " --texts {output.texts:q} --record {output.record:q} --log-file {log:q}"


rule sample_chat:
    """Write conversations about the standard library, or with requests that call tools."""
    output:
        chats=expand("data/sample/{{source}}/part_{part}.jsonl", part=range(2)),
        record="data/sample/{source}/record.json",
    log:
        "<logs>/sample_chat/{source}.log",
    benchmark:
        "<benchmarks>/sample_chat/{source}.tsv"
    wildcard_constraints:
        source="questions|tools",
    shell:
        "python scripts/sample_chat.py --source {wildcards.source:q}"
        " --chats {output.chats:q} --record {output.record:q} --log-file {log:q}"
