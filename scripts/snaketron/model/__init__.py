"""The model: a hybrid of Mamba-2, attention and latent mixture of experts with multi-token prediction.

Importing anything below this package first prepares megatron-core for the machine: `backend` imports it, and
`megatron.replacements` puts everything in its place. Without that megatron-core needs a GPU.
"""

from snaketron.model.megatron import quiet

quiet.silence()
with quiet.light_import():
    from snaketron.model import backend as backend
    from snaketron.model.megatron import replacements

    replacements.apply(backend.MACHINE)
