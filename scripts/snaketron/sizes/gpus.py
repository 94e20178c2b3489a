"""What each kind of GPU can do, by its data sheet, and how its nodes are wired."""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config import Cluster


class Gpu(NamedTuple):
    """Peaks of a GPU; what programs reach of them are the shares in `sizes.step`."""

    flops: float  # of dense products in bf16, a second
    memory_speed: float  # bytes a second
    nvlink: float  # bytes a second in one direction
    domain: int  # GPUs that NVLink connects
    network: float  # bytes a second of its share of the adapters, in one direction
    gpus_per_node: int
    usable_gb: float  # 10^9 bytes that a plan may fill: without libraries (2 GB) and what the allocator loses


GPUS = {
    "h100": Gpu(989e12, 3.35e12, 450e9, 8, 50e9, 8, 74),
    "h200": Gpu(989e12, 4.8e12, 450e9, 8, 50e9, 8, 132),
    "b200": Gpu(2250e12, 8.0e12, 900e9, 8, 50e9, 8, 170),
    "gb200": Gpu(2500e12, 8.0e12, 900e9, 72, 50e9, 4, 176),
    "gb300": Gpu(2500e12, 8.0e12, 900e9, 72, 100e9, 4, 265),
}


def in_nodes(name: str, cluster: Cluster) -> Gpu:
    """A kind of GPU in the nodes that are configured for it, else in those that it is usually sold in.

    NVLink reaches as far as a node; that of GB200 and GB300 reaches a rack.
    """
    gpu, here = GPUS[name], cluster.gpus_per_node
    if name != cluster.gpu or here in (0, gpu.gpus_per_node):
        return gpu
    return gpu._replace(gpus_per_node=here, domain=here if gpu.domain == gpu.gpus_per_node else gpu.domain)


def of_cluster(cluster: Cluster) -> Gpu | None:
    """The GPUs of the configured nodes; None where their kind is not known, or trainings run on CPUs."""
    return in_nodes(cluster.gpu, cluster) if cluster.gpu and cluster.gpus_per_node else None


def usable_bytes(cluster: Cluster) -> float | None:
    """Bytes of a GPU that a training may fill, by the configuration; None: it says nothing of the GPU."""
    if cluster.gpu_memory_gb is not None:
        return cluster.gpu_memory_gb * 1e9
    return GPUS[cluster.gpu].usable_gb * 1e9 if cluster.gpu else None
