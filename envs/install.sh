#!/bin/sh
# What an image of the GPU jobs holds beside its base; /opt/snaketron has the parts of the repository that it needs.
# Both recipes run this file: snaketron.def (apptainer) and Containerfile (buildah, podman, docker).
set -eu
apt-get update && apt-get install -y --no-install-recommends ca-certificates git python3.12-dev python3.12-venv
python3.12 -m venv /opt/uv && /opt/uv/bin/pip install uv==0.13.9
# An image is read-only: without bytecode each process would compile torch and megatron-core anew (6 s).
cd /opt/snaketron && UV_COMPILE_BYTECODE=1 UV_PROJECT_ENVIRONMENT=/opt/venv /opt/uv/bin/uv sync --no-dev --extra "${EXTRA:-gpu}"

# apptainer and docker know the environment from their recipes; enroot reads the first file, charliecloud the second.
path=/opt/venv/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /ch
echo "PATH=$path" | tee -a /etc/environment > /ch/environment
