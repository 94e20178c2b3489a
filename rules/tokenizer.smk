rule build_tokenizer:
    """Train a byte-level BPE tokenizer, or take one from a directory or the hub.

    The text is `ancient`, because a changed raw file must not change the ids of all text.
    """
    input:
        text=ancient(graph.tokenizer_text),
        hub=graph.hub_tokenizer,
    output:
        tokenizer="<data>/tokenizer/tokenizer.json",
        config="<data>/tokenizer/tokenizer_config.json",
        record="<data>/tokenizer/record.json",
    log:
        "<logs>/build_tokenizer.log",
    benchmark:
        "<benchmarks>/build_tokenizer.tsv"
    priority: 1
    threads: 2
    resources:
        reading=graph.tokenizer_reading,  # a tokenizer that is there has passed it
    params:
        settings=graph.tokenizer_settings,
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/build_tokenizer.py --settings {params.settings:q} --text {input.text:q}"
        " --reading {resources.reading:q} --output {output.tokenizer:q} --record {output.record:q} --log-file {log:q}"


rule install_chat_template:
    """Check the chat template and put it beside the tokenizer.

    This is a rule of its own, so that a changed template renders chats again and tokenizes no text.
    """
    input:
        template=graph.chat_template,
    output:
        template="<data>/tokenizer/chat_template.jinja",
        record="<data>/tokenizer/chat_template.json",
    log:
        "<logs>/install_chat_template.log",
    benchmark:
        "<benchmarks>/install_chat_template.tsv"
    params:
        settings=graph.template_settings,
    shell:
        "python scripts/install_chat_template.py --settings {params.settings:q}"
        " --output {output.template:q} --record {output.record:q} --log-file {log:q}"
