rule import_base:
    """Import a checkpoint from elsewhere, which trainings begin with or which is the result of a phase, and verify it.

    The output is a link, like the output of rule pretrain. The template is `ancient`, because no weight depends on it.
    """
    input:
        weights=graph.bases.files,
        tokenizer="<data>/tokenizer/tokenizer.json",
        template=ancient("<data>/tokenizer/chat_template.jinja"),
    output:
        update(directory("<ckpt>/base/{base}")),
    log:
        "<logs>/import_base/{base}.log",
    benchmark:
        "<benchmarks>/import_base/{base}.tsv"
    wildcard_constraints:
        base=r"[a-z0-9_]+",
    resources:
        mem_mb=graph.training.conversion_mb,
        seq_length=graph.bases.seq_length,
        stage=graph.bases.stage,
    params:
        source=graph.bases.directory,
        model=graph.bases.model,
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "python scripts/import_base.py --source {params.source:q} --stage {resources.stage:q}"
        " --model {params.model:q} --tokenizer {params.tokenizer:q} --seq-length {resources.seq_length:q}"
        " --output {output:q} --log-file {log:q}"


# The phase is then not trained.
use rule import_base as register_checkpoint with:
    output:
        update(directory("<ckpt>/pretrain/{phase}")),
    log:
        "<logs>/register_checkpoint/{phase}.log",
    benchmark:
        "<benchmarks>/register_checkpoint/{phase}.tsv"
    wildcard_constraints:
        phase=graph.given("phases"),


rule export_hf:
    """Write a checkpoint as transformers and vLLM read it: safetensors, tokenizer and model card.

    One layer is in memory at a time, so a node without a GPU exports any model. An older export stays until
    the new one is complete.
    """
    input:
        "<ckpt>/{stage}",
    output:
        update(directory("<hf>/{stage}")),
    log:
        "<logs>/export_hf/{stage}.log",
    benchmark:
        "<benchmarks>/export_hf/{stage}.tsv"
    wildcard_constraints:
        stage=r"(base|pretrain|merged)/[a-z0-9_]+|sft|lora_merged",
    resources:
        mem_mb=graph.training.conversion_mb,
    shell:
        "python scripts/export_hf.py --checkpoint {input:q} --output {output:q} --log-file {log:q}"


rule export_adapters:
    """Write the adapters alone as PEFT reads them; the rule export_hf writes the model that they belong to."""
    input:
        "<ckpt>/lora",
    output:
        update(directory("<hf>/lora")),
    log:
        "<logs>/export_adapters.log",
    benchmark:
        "<benchmarks>/export_adapters.tsv"
    resources:
        mem_mb=graph.training.conversion_mb,
    params:
        base=graph.training.exported_base,
    shell:
        "python scripts/export_hf.py --checkpoint {input:q} --base {params.base:q} --output {output:q}"
        " --log-file {log:q}"


rule evaluate:
    """Losses of the test splits, exact answers and tasks of lm-eval, by the checkpoint as it is.

    It works in a directory below <eval>/versions, where a killed evaluation finds what it has done.
    """
    input:
        checkpoint="<ckpt>/{stage}",
        text=expand("<data>/pretrain/{phase}/blend.json", phase=graph.training.phases),
        chats="<data>/sft/blend.json",
        tasks=graph.evaluation.task_data,
    output:
        "<eval>/{stage}.json",
    log:
        "<logs>/evaluate/{stage}.log",
    benchmark:
        "<benchmarks>/evaluate/{stage}.tsv"
    wildcard_constraints:
        stage=r"(base|pretrain|merged)/[a-z0-9_]+|sft|lora|lora_merged",
    threads: graph.evaluation.threads()
    resources:
        **graph.evaluation.resources(),
    params:
        settings=graph.evaluation.settings,
    shell:
        "python scripts/evaluate.py --checkpoint {input.checkpoint:q} --text {input.text:q}"
        " --chats {input.chats:q} --settings {params.settings:q} --run-settings {resources.run:q}"
        " --output {output:q} --log-file {log:q}"
