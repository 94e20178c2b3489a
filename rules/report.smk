rule data_report:
    """Report what is in the data, from the records alone: as text, a page and figures."""
    input:
        indices=expand("<data>/pretrain/{phase}/index.json", phase=graph.phases),
        chats="<data>/sft/record.json",
    output:
        text="<data>/report/report.md",
        record="<data>/report/record.json",
        page=report(
            "<data>/report/report.html",
            caption="report/report.rst",
            category="Data",
            labels={"what": "the whole report"},
        ),
        tokens=report(
            "<data>/report/tokens.svg",
            caption="report/tokens.rst",
            category="Data",
            labels={"what": "tokens of each corpus"},
        ),
        lengths=report(
            "<data>/report/lengths.svg",
            caption="report/lengths.rst",
            category="Data",
            labels={"what": "lengths"},
        ),
        mix=report(
            "<data>/report/mix.svg",
            caption="report/mix.rst",
            category="Data",
            labels={"what": "mix of each phase"},
        ),
        removed=report(
            "<data>/report/removed.svg",
            caption="report/removed.rst",
            category="Data",
            labels={"what": "what was removed"},
        ),
        packing=report(
            "<data>/report/packing.svg",
            caption="report/packing.rst",
            category="Data",
            labels={"what": "packing of conversations"},
        ),
    log:
        "<logs>/data_report.log",
    benchmark:
        "<benchmarks>/data_report.tsv"
    params:
        directory=subpath(output.text, parent=True),
    shell:
        # Linux keeps a quarter of the stack for arguments: with its usual size too little for all shards.
        "ulimit -Ss hard; python scripts/data_report.py --records {input.indices:q} {input.chats:q}"
        " --output {params.directory:q} --log-file {log:q}"


rule report:
    """Make one page about the run, finished or not, each time that it is asked for.

    Beside other targets it waits for them. It reads what lies in the directory, so nothing of the workflow is its input.
    """
    input:
        graph.before_report,
    output:
        report(
            "report/report.html",
            caption="report/run.rst",
            category="Run",
            labels={"what": "the whole run"},
        ),
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.tsv"
    localrule: True
    shell:
        "python scripts/report.py --alone --output {output:q} --log-file {log:q}"
