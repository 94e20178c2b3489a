"""What the Snakefile and the rules ask.

- The rules: `graph`; for their own files `base`, `curation`, `evaluation` and `training`; which
  raw files were changed: `raw_files`; targets of unknown names: `unknown`.
- What is refused before the first job: `checks`, `requests`, `submission`.
- What is said: `notes` about a configuration and targets, `outlook` about trainings, `dry_run` at its end,
  `lines` about jobs, which `terminal` writes, and `journal` for programs; which jobs were `stops`, for both.
- The process of Snakemake: `process`; what is replaced in it: `snakemake`.
- What programs beside it ask: `configfiles`, `plan` with the keys in `planned` and `disk`, `asked`.
"""
