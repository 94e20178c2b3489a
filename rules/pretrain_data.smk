rule tokenize_shard:
    """Tokenize the raw files of a shard and split their documents into train, valid and test."""
    input:
        text=graph.text_to_tokenize,
        tokenizer="<data>/tokenizer/tokenizer.json",
    output:
        bins=expand("<data>/tokens/{{corpus}}/{split}/{{shard}}.bin", split=SPLITS),
        idxs=expand("<data>/tokens/{{corpus}}/{split}/{{shard}}.idx", split=SPLITS),
        documents="<data>/tokens/{corpus}/{shard}.parquet",
        record="<data>/tokens/{corpus}/{shard}.json",
    log:
        "<logs>/tokenize_shard/{corpus}/{shard}.log",
    benchmark:
        "<benchmarks>/tokenize_shard/{corpus}/{shard}.tsv"
    wildcard_constraints:
        corpus=graph.others("corpora"),
    priority: 1
    threads: graph.config.pretrain_data.cpus_per_task
    params:
        settings=graph.tokenize_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/tokenize_shard.py --text {input.text:q} --settings {params.settings:q}"
        " --tokenizer {params.tokenizer:q} --threads {threads:q} --bins {output.bins:q}"
        " --documents {output.documents:q} --record {output.record:q} --log-file {log:q}"


rule register_tokens:
    """Verify a pair of .bin and .idx that was made elsewhere; its record stands in for that of tokenize_shard."""
    input:
        pair=graph.raw_text,
        tokenizer="<data>/tokenizer/tokenizer.json",
    output:
        "<data>/tokens/{corpus}/{shard}.json",
    log:
        "<logs>/register_tokens/{corpus}/{shard}.log",
    benchmark:
        "<benchmarks>/register_tokens/{corpus}/{shard}.tsv"
    wildcard_constraints:
        corpus=graph.given("corpora"),
    params:
        settings=graph.register_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/register_tokens.py --pair {input.pair:q} --settings {params.settings:q}"
        " --tokenizer {params.tokenizer:q} --record {output:q} --log-file {log:q}"


rule blend_pretrain:
    """Weigh the tokenized shards of a phase; nothing is tokenized or copied."""
    input:
        records=graph.phase_shards("<data>/tokens/{corpus}/{shard}.json"),
        bins=graph.phase_shards(
            "<data>/tokens/{corpus}/train/{shard}.bin", made_here=True
        ),
        tokenizer="<data>/tokenizer/tokenizer.json",
    output:
        blend="<data>/pretrain/{phase}/blend.json",
        record="<data>/pretrain/{phase}/record.json",
    log:
        "<logs>/blend_pretrain/{phase}.log",
    benchmark:
        "<benchmarks>/blend_pretrain/{phase}.tsv"
    priority: 1
    resources:
        # Only a warning depends on max_epochs, so it is no parameter.
        max_epochs=str(graph.config.pretrain_data.max_epochs),
    params:
        settings=graph.phase_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/blend_pretrain.py --settings {params.settings:q} --max-epochs {resources.max_epochs:q}"
        " --records {input.records:q} --tokenizer {params.tokenizer:q}"
        " --output {output.blend:q} --record {output.record:q} --log-file {log:q}"


rule index_pretrain:
    """Build the sample index of a phase with megatron-core, so that no GPU waits for it."""
    input:
        "<data>/pretrain/{phase}/blend.json",
    output:
        index=directory("<data>/pretrain/{phase}/index"),
        record="<data>/pretrain/{phase}/index.json",
    log:
        "<logs>/index_pretrain/{phase}.log",
    benchmark:
        "<benchmarks>/index_pretrain/{phase}.tsv"
    priority: 1
    resources:
        **graph.index_resources(),
    params:
        settings=graph.index_settings,
    shell:
        "python scripts/index_pretrain.py --blend {input:q} --settings {params.settings:q}"
        " --output {output.index:q} --record {output.record:q} --log-file {log:q}"
