"""Detects whether this process is one of several, before JAX is imported.

JAX detects the processes of a run on SLURM, GKE and TPU VMs. The same environment variables are read here, but only to find out
whether there is more than one process: a single process starts no coordination service and waits for no other.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from rlens_jax.config import HostsConfig

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def is_distributed(hosts: HostsConfig) -> bool:
    """Whether the run has more than one process, by the configuration if it says so, else by the cluster."""
    if hosts.num_processes is not None:
        return hosts.num_processes > 1
    return cluster_type(os.environ, tpu_workers) is not None


def cluster_type(environ: Mapping[str, str], workers: Callable[[], str]) -> str | None:
    """Cluster type for `jax.distributed.initialize` if this is one of several processes, else None.

    Args:
        environ: the environment variables.
        workers: returns the hosts of a TPU VM's slice, separated by commas; called if no variable decides.
    """
    if all(name in environ for name in _SLURM):
        return "slurm" if int(environ["SLURM_NTASKS"]) > 1 else None
    addresses = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if addresses is not None:
        return "gketpu" if "," in addresses else None
    # As in JAX, TPU_SKIP_MDS_QUERY means that there is no metadata server.
    if "TPU_SKIP_MDS_QUERY" not in environ and "," in workers():
        return "gcetpu"
    return None


def tpu_workers() -> str:
    """The hosts of this TPU VM's slice, separated by commas; empty on machines without TPU chips."""
    if not (any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))):
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(_METADATA.format(server), headers={"Metadata-Flavor": "Google"})
    # The metadata server belongs to the machine; proxies do not reach it.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""
