rule pretrain:
    """Train one phase of pretraining, from the end of the phase before it.

    The output is a link to a directory below <ckpt>/versions. Snakemake does not know that directory, so
    a killed training finds its checkpoints there. `update` keeps the link until the next version is complete.
    `params` define the result, `resources` how it is made.
    """
    input:
        blend="<data>/pretrain/{phase}/blend.json",
        index="<data>/pretrain/{phase}/index",
        tokenizer="<data>/tokenizer/tokenizer.json",
        base=graph.training.previous_phase,
    output:
        update(directory("<ckpt>/pretrain/{phase}")),
    log:
        "<logs>/pretrain/{phase}.log",
    benchmark:
        "<benchmarks>/pretrain/{phase}.tsv"
    wildcard_constraints:
        phase=graph.others("phases"),
    priority: 1
    threads: graph.training.threads("pretrain")
    resources:
        **graph.training.resources("pretrain"),
    params:
        settings=graph.training.settings("pretrain"),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/pretrain.py --blend {input.blend:q} --index {input.index:q}"
        " --tokenizer {params.tokenizer:q}"
        " --base {input.base:q} --settings {params.settings:q} --run-settings {resources.run:q}"
        " --output {output:q} --log-file {log:q} --attempt {resources.attempt:q}"


rule merge_checkpoints:
    """Average the checkpoints of a phase from before its learning rate falls, in place of a decay.

    The output is a link, like the output of rule pretrain. One tensor is in memory at a time.
    """
    input:
        graph.training.averaged,
    output:
        update(directory("<ckpt>/merged/{phase}")),
    log:
        "<logs>/merge_checkpoints/{phase}.log",
    benchmark:
        "<benchmarks>/merge_checkpoints/{phase}.tsv"
    resources:
        mem_mb=3 * graph.training.conversion_mb,
    params:
        tokens=graph.config.pretrain.merge_tokens or 0,
    shell:
        "python scripts/merge_checkpoints.py --checkpoint {input:q} --stage merged/{wildcards.phase:q}"
        " --tokens {params.tokens:q} --output {output:q} --log-file {log:q}"
