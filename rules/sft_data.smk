rule render_chat:
    """Render the conversations of a shard to tokens and a mask of the assistant's answers."""
    input:
        chats=graph.raw_chats,
        tokenizer="<data>/tokenizer/tokenizer.json",
        template=graph.source_template,
    output:
        rendered="<data>/chat/{source}/{shard}.parquet",
        record="<data>/chat/{source}/{shard}.json",
    log:
        "<logs>/render_chat/{source}/{shard}.log",
    benchmark:
        "<benchmarks>/render_chat/{source}/{shard}.tsv"
    params:
        settings=graph.render_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/render_chat.py --chats {input.chats:q} --settings {params.settings:q}"
        " --tokenizer {params.tokenizer:q} --template {input.template:q}"
        " --output {output.rendered:q} --record {output.record:q} --log-file {log:q}"


rule pack_sft:
    """Pack rendered conversations; no conversation is split across packs."""
    input:
        graph.rendered_chats,
    output:
        train="<data>/sft/train/{source}/{shard}.parquet",
        valid="<data>/sft/valid/{source}/{shard}.parquet",
        test="<data>/sft/test/{source}/{shard}.parquet",
        record="<data>/sft/{source}/{shard}.json",
    log:
        "<logs>/pack_sft/{source}/{shard}.log",
    benchmark:
        "<benchmarks>/pack_sft/{source}/{shard}.tsv"
    wildcard_constraints:
        source=graph.others("chats"),
    resources:
        # It decides whether there are packs and not what is in them, so it is no parameter.
        max_dropped_fraction=str(graph.config.sft_data.max_dropped_fraction),
    params:
        settings=graph.pack_settings(),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/pack_sft.py --chats {input:q} --settings {params.settings:q}"
        " --max-dropped-fraction {resources.max_dropped_fraction:q}"
        " --train {output.train:q} --valid {output.valid:q} --test {output.test:q}"
        " --record {output.record:q} --log-file {log:q}"


rule register_packs:
    """Verify a file of packs that was made elsewhere; what it writes stands in for the outputs of pack_sft."""
    input:
        packs=graph.raw_chats,
        tokenizer="<data>/tokenizer/tokenizer.json",
    output:
        train="<data>/sft/train/{source}/{shard}.parquet",
        valid="<data>/sft/valid/{source}/{shard}.parquet",
        test="<data>/sft/test/{source}/{shard}.parquet",
        record="<data>/sft/{source}/{shard}.json",
    log:
        "<logs>/register_packs/{source}/{shard}.log",
    benchmark:
        "<benchmarks>/register_packs/{source}/{shard}.tsv"
    wildcard_constraints:
        source=graph.given("chats"),
    params:
        settings=graph.register_settings,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/register_packs.py --packs {input.packs:q} --settings {params.settings:q}"
        " --tokenizer {params.tokenizer:q} --train {output.train:q} --valid {output.valid:q}"
        " --test {output.test:q} --record {output.record:q} --log-file {log:q}"


rule blend_sft:
    """Weigh the packed shards; nothing is repacked or copied."""
    input:
        records=graph.sft_shards("<data>/sft/{source}/{shard}.json"),
        packs=graph.sft_shards("<data>/sft/train/{source}/{shard}.parquet"),
    output:
        blend="<data>/sft/blend.json",
        record="<data>/sft/record.json",
    log:
        "<logs>/blend_sft.log",
    benchmark:
        "<benchmarks>/blend_sft.tsv"
    params:
        settings=graph.blend_settings(),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/blend_sft.py --settings {params.settings:q} --records {input.records:q}"
        " --output {output.blend:q} --record {output.record:q} --log-file {log:q}"
