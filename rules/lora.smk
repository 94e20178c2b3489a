rule lora:
    """Tune low-rank adapters on the packed conversations; the checkpoint of the last phase is frozen.

    The output holds the adapters alone. It is a link, like the output of rule pretrain.
    """
    input:
        blend="<data>/sft/blend.json",
        tokenizer="<data>/tokenizer/tokenizer.json",
        template="<data>/tokenizer/chat_template.jinja",
        base=graph.training.base("lora"),
    output:
        update(directory("<ckpt>/lora")),
    log:
        "<logs>/lora.log",
    benchmark:
        "<benchmarks>/lora.tsv"
    threads: graph.training.threads("lora")
    resources:
        **graph.training.resources("lora"),
    params:
        settings=graph.training.settings("lora"),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/lora.py --blend {input.blend:q} --tokenizer {params.tokenizer:q}"
        " --base {input.base:q} --settings {params.settings:q} --run-settings {resources.run:q}"
        " --output {output:q} --log-file {log:q} --attempt {resources.attempt:q}"


rule merge_lora:
    """Add the adapters to the checkpoint that they were trained on, so that the output is like that of rule sft.

    It runs in the layout of the training, and measures the loss on the blend before and after.
    """
    input:
        blend="<data>/sft/blend.json",
        tokenizer="<data>/tokenizer/tokenizer.json",
        template="<data>/tokenizer/chat_template.jinja",
        base=graph.training.base("lora"),
        adapters="<ckpt>/lora",
    output:
        update(directory("<ckpt>/lora_merged")),
    log:
        "<logs>/merge_lora.log",
    benchmark:
        "<benchmarks>/merge_lora.tsv"
    threads: graph.training.threads("lora")
    resources:
        **graph.training.resources("lora"),
    params:
        settings=graph.training.settings("lora", stage="lora_merged"),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/merge_lora.py --blend {input.blend:q} --tokenizer {params.tokenizer:q}"
        " --base {input.base:q} --adapters {input.adapters:q}"
        " --settings {params.settings:q} --run-settings {resources.run:q}"
        " --output {output:q} --log-file {log:q} --attempt {resources.attempt:q}"
