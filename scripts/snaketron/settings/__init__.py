"""What one job is told, from the configuration.

What defines the result of a job is a `params` of its rule, so a change runs it again; how it is run is not.
"""
