"""Whether this process is one of several; asked before JAX is imported.

Where JAX finds the processes of a run by itself (SLURM, GKE, TPU VMs), the same signs are looked at here, but only for
whether there is more than one: a single process starts no service and waits for nobody.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from rlens_jax.config import HostsConfig

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def several(hosts: HostsConfig) -> bool:
    """Whether the run has more than one process: as the configuration says, else as a cluster says."""
    if hosts.num_processes is not None:
        return hosts.num_processes > 1
    return detected(os.environ, tpu_workers) is not None


def detected(environ: Mapping[str, str], workers: Callable[[], str]) -> str | None:
    """The kind of cluster that this is one of several processes of, None when there is none.

    Args:
        environ: the environment variables.
        workers: the hosts of a TPU VM's slice, separated by commas; asked when no variable says more.

    Returns:
        The name that `jax.distributed.initialize` knows the kind of cluster by.
    """
    if all(name in environ for name in _SLURM):
        return "slurm" if int(environ["SLURM_NTASKS"]) > 1 else None
    named = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if named is not None:
        return "gketpu" if "," in named else None
    # TPU_SKIP_MDS_QUERY: as JAX reads it, this is no TPU VM with a metadata server.
    if "TPU_SKIP_MDS_QUERY" not in environ and "," in workers():
        return "gcetpu"
    return None


def tpu_workers() -> str:
    """The hosts of this TPU VM's slice, separated by commas; empty where there are no TPU chips."""
    if not (any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))):
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(_METADATA.format(server), headers={"Metadata-Flavor": "Google"})
    # The metadata server is the machine's own; no proxy leads to it.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""
