rule filter_shard:
    """Let datatrove's filters choose the documents of a shard of raw files.

    The tokenizer is `ancient`, because it only counts the tokens of what is removed.
    """
    input:
        text=graph.raw_text,
        models=graph.language_models,
        tokenizer=ancient("<data>/tokenizer/tokenizer.json"),
    output:
        filtered="<data>/curation/filtered/{corpus}/{shard}.parquet",
        record="<data>/curation/filtered/{corpus}/{shard}.json",
    log:
        "<logs>/filter_shard/{corpus}/{shard}.log",
    benchmark:
        "<benchmarks>/filter_shard/{corpus}/{shard}.tsv"
    resources:
        num_examples=graph.config.curation.num_examples,
    params:
        settings=graph.curation.filter_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/filter_shard.py --text {input.text:q} --tokenizer {params.tokenizer:q}"
        " --settings {params.settings:q} --num-examples {resources.num_examples:q}"
        " --output {output.filtered:q} --record {output.record:q} --log-file {log:q}"


rule exact_signature:
    """Write a hash of each document of a filtered shard."""
    input:
        "<data>/curation/filtered/{corpus}/{shard}.parquet",
    output:
        signature="<data>/curation/exact_signatures/{corpus}/{shard}.sig",
        record="<data>/curation/exact_signatures/{corpus}/{shard}.json",
    log:
        "<logs>/exact_signature/{corpus}/{shard}.log",
    benchmark:
        "<benchmarks>/exact_signature/{corpus}/{shard}.tsv"
    shell:
        "python scripts/exact_signature.py --filtered {input:q}"
        " --output {output.signature:q} --record {output.record:q} --log-file {log:q}"


rule exact_find:
    """Find the documents whose text an earlier document of the group has, in the order of corpora and shards."""
    input:
        signatures=graph.curation.shards(
            "exact_dedup", "<data>/curation/exact_signatures/{corpus}/{shard}.sig"
        ),
    output:
        duplicates="<data>/curation/exact_duplicates/{group}.parquet",
        record="<data>/curation/exact_duplicates/{group}.json",
    log:
        "<logs>/exact_find/{group}.log",
    benchmark:
        "<benchmarks>/exact_find/{group}.tsv"
    params:
        order=graph.curation.corpora_of("exact_dedup"),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/exact_find.py --signatures {input.signatures:q}"
        " --output {output.duplicates:q} --record {output.record:q} --log-file {log:q}"


rule minhash_signature:
    """Write the MinHash signature of each document of a filtered shard."""
    input:
        "<data>/curation/filtered/{corpus}/{shard}.parquet",
    output:
        signature="<data>/curation/minhash_signatures/{corpus}/{shard}.sig",
        record="<data>/curation/minhash_signatures/{corpus}/{shard}.json",
    log:
        "<logs>/minhash_signature/{corpus}/{shard}.log",
    benchmark:
        "<benchmarks>/minhash_signature/{corpus}/{shard}.tsv"
    params:
        settings=graph.curation.minhash_settings(),
    shell:
        "python scripts/minhash_signature.py --filtered {input:q} --settings {params.settings:q}"
        " --output {output.signature:q} --record {output.record:q} --log-file {log:q}"


rule minhash_buckets:
    """Find the pairs of documents of a group that agree in one bucket of their signatures.

    Exact duplicates are left out, so that one of two copies stays.
    """
    input:
        signatures=graph.curation.shards(
            "minhash_dedup", "<data>/curation/minhash_signatures/{corpus}/{shard}.sig"
        ),
        removals=graph.curation.exact_duplicates_of_group,
    output:
        pairs="<data>/curation/minhash_pairs/{group}/{bucket}.dups",
        record="<data>/curation/minhash_pairs/{group}/{bucket}.json",
    log:
        "<logs>/minhash_buckets/{group}/{bucket}.log",
    benchmark:
        "<benchmarks>/minhash_buckets/{group}/{bucket}.tsv"
    wildcard_constraints:
        bucket=r"\d+",
    params:
        settings=graph.curation.minhash_settings(),
        order=graph.curation.corpora_of("minhash_dedup"),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/minhash_buckets.py --signatures {input.signatures:q} --removals {input.removals:q}"
        " --bucket {wildcards.bucket:q} --settings {params.settings:q}"
        " --output {output.pairs:q} --record {output.record:q} --log-file {log:q}"


rule minhash_cluster:
    """Join the pairs of all buckets: the first document of each cluster stays."""
    input:
        pairs=expand(
            "<data>/curation/minhash_pairs/{{group}}/{bucket}.dups",
            bucket=range(graph.config.curation.minhash.num_buckets),
        ),
        signatures=graph.curation.shards(
            "minhash_dedup", "<data>/curation/minhash_signatures/{corpus}/{shard}.sig"
        ),
    output:
        duplicates="<data>/curation/near_duplicates/{group}.parquet",
        record="<data>/curation/near_duplicates/{group}.json",
    log:
        "<logs>/minhash_cluster/{group}.log",
    benchmark:
        "<benchmarks>/minhash_cluster/{group}.tsv"
    params:
        settings=graph.curation.minhash_settings(),
        order=graph.curation.corpora_of("minhash_dedup"),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/minhash_cluster.py --pairs {input.pairs:q} --signatures {input.signatures:q}"
        " --settings {params.settings:q}"
        " --output {output.duplicates:q} --record {output.record:q} --log-file {log:q}"


rule decontamination_index:
    """Write the hashes of the n-grams (of words) of the evaluation texts."""
    input:
        graph.evaluation_texts,
    output:
        index="<data>/curation/evaluation/index.parquet",
        record="<data>/curation/evaluation/index.json",
    log:
        "<logs>/decontamination_index.log",
    benchmark:
        "<benchmarks>/decontamination_index.tsv"
    params:
        text_field=graph.config.curation.evaluation_field,
        n_grams=graph.config.curation.decontamination_n_grams,
    shell:
        "python scripts/decontamination_index.py --texts {input:q} --text-field={params.text_field:q}"
        " --n-grams {params.n_grams:q} --output {output.index:q} --record {output.record:q} --log-file {log:q}"


rule curate_shard:
    """Remove duplicates and contaminated documents from a filtered shard, and replace personal addresses."""
    input:
        filtered="<data>/curation/filtered/{corpus}/{shard}.parquet",
        exact=graph.curation.exact_duplicates,
        near=graph.curation.near_duplicates,
        index=graph.curation.decontamination_index,
        tokenizer=ancient("<data>/tokenizer/tokenizer.json"),
    output:
        curated="<data>/curated/{corpus}/{shard}.parquet",
        record="<data>/curated/{corpus}/{shard}.json",
    log:
        "<logs>/curate_shard/{corpus}/{shard}.log",
    benchmark:
        "<benchmarks>/curate_shard/{corpus}/{shard}.tsv"
    resources:
        num_examples=graph.config.curation.num_examples,
    params:
        settings=graph.curation.curate_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/curate_shard.py --filtered {input.filtered:q} --exact {input.exact:q}"
        " --near {input.near:q} --index {input.index:q} --tokenizer {params.tokenizer:q}"
        " --settings {params.settings:q} --num-examples {resources.num_examples:q}"
        " --output {output.curated:q} --record {output.record:q} --log-file {log:q}"
