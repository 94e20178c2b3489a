rule export_hf:
    """Write a checkpoint as transformers and vLLM read it: safetensors, tokenizer and model card.

    One layer is in memory at a time, so a node without a GPU exports any model.
    """
    input:
        "<ckpt>/{stage}",
    output:
        directory("<hf>/{stage}"),
    log:
        "<logs>/export_hf/{stage}.log",
    benchmark:
        "<benchmarks>/export_hf/{stage}.tsv"
    wildcard_constraints:
        stage=r"pretrain/[a-z0-9_]+|sft|lora_merged",
    resources:
        mem_mb=graph.training.conversion_mb,
    shell:
        "python scripts/export_hf.py --checkpoint {input:q} --output {output:q} --log-file {log:q}"
