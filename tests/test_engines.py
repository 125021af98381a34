"""A store that a cluster makes is the one that this machine makes: local clusters of both kinds."""

from pathlib import Path
from typing import Any

import pytest

from foldcore.data.prepare import Settings, prepare


def needed(package: str, engine: str) -> Any:
    return pytest.importorskip(
        package, reason=f"{package} is not installed: pip install 'twinfold[{engine}]'"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_cluster_makes_the_same_store(tmp_path: Path, engine: str, package: str) -> None:
    needed("joblib", engine)
    needed(package, engine)
    here = prepare(["embedded"], tmp_path / "here", Settings(jobs=1, quiet=True))
    there = prepare(["embedded"], tmp_path / "there", Settings(engine=engine, quiet=True))
    for path in here.glob("*-*.arrow"):
        assert path.read_bytes() == (there / path.name).read_bytes()
    assert (here / "chains.arrow").read_bytes() == (there / "chains.arrow").read_bytes()


@pytest.mark.slow
def test_a_running_dask_cluster_is_joined(tmp_path: Path) -> None:
    distributed = needed("distributed", "dask")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        settings = Settings(engine="dask", address=cluster.scheduler_address, quiet=True)
        store = prepare(["embedded"], tmp_path / "store", settings)
        assert len(cluster.workers) == 2  # it is left running
    assert (store / "store.json").is_file()


@pytest.mark.slow
def test_a_running_ray_cluster_is_joined(tmp_path: Path) -> None:
    needed("ray", "ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        settings = Settings(engine="ray", address=cluster.address, quiet=True)
        store = prepare(["embedded"], tmp_path / "store", settings)
        assert cluster.head_node.any_processes_alive()  # it is left running
    finally:
        cluster.shutdown()
    assert (store / "store.json").is_file()
