"""The model: a hybrid of Mamba-2, attention and latent mixture of experts with multi-token prediction.

Importing anything below this package first imports `backend`, which prepares megatron-core for the
machine it runs on; without it megatron-core needs a GPU.
"""

from snaketron.model import backend as backend
from snaketron.model.megatron import packed as packed
from snaketron.model.megatron import padding as padding
