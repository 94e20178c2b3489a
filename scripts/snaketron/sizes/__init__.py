"""The size of models and trainings: plain arithmetic on the configuration, without torch.

Every job parses the Snakefile, which asks for these numbers, so they must be fast to import and compute.
"""
