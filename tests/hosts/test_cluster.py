import pytest

from rlens_jax.config import HostsConfig
from rlens_jax.hosts import cluster
from rlens_jax.hosts.cluster import cluster_type, is_distributed

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BATCH = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}


@pytest.mark.parametrize(
    ("environ", "workers", "kind"),
    [
        ({}, "", None),
        (SLURM, "", "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, "", None),
        (BATCH, "", None),  # inside sbatch, outside srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "", "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "a,b", None),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, "", "gketpu"),
        ({}, "u:0:10.0.0.1,u:1:10.0.0.2", "gcetpu"),
        ({}, "u:0:10.0.0.1", None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "a,b", None),
    ],
)
def test_a_cluster_is_one_when_it_has_more_than_one_process(environ, workers, kind):
    assert cluster_type(environ, lambda: workers) == kind


def test_the_kinds_are_those_that_jax_knows():
    from jax._src.clusters import ClusterEnv

    assert {"slurm", "gketpu", "gcetpu"} <= {kind.name for kind in ClusterEnv._cluster_types}


def test_the_configuration_precedes_the_cluster(monkeypatch):
    monkeypatch.setattr(cluster, "cluster_type", lambda *_: "slurm")
    assert is_distributed(HostsConfig())
    assert not is_distributed(HostsConfig(num_processes=1))
    monkeypatch.setattr(cluster, "cluster_type", lambda *_: None)
    assert not is_distributed(HostsConfig())
    assert is_distributed(HostsConfig("host:80", 2, 1))
