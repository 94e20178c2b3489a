rule sft:
    """Tune the checkpoint of the last phase on the packed conversations, and write the summary of all stages.

    The output is a link, like the output of rule pretrain.
    """
    input:
        blend="<data>/sft/blend.json",
        tokenizer="<data>/tokenizer/tokenizer.json",
        template="<data>/tokenizer/chat_template.jinja",
        base=graph.training.base("sft"),
    output:
        update(directory("<ckpt>/sft")),
    log:
        "<logs>/sft.log",
    benchmark:
        "<benchmarks>/sft.tsv"
    threads: graph.training.threads("sft")
    resources:
        **graph.training.resources("sft"),
    params:
        settings=graph.training.settings("sft"),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/sft.py --blend {input.blend:q} --tokenizer {params.tokenizer:q}"
        " --base {input.base:q} --settings {params.settings:q} --run-settings {resources.run:q}"
        " --output {output:q} --log-file {log:q} --attempt {resources.attempt:q}"
