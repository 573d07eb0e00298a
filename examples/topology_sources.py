"""Topologies from what Kubernetes, NVIDIA's driver and Ray say of nodes. Runs on answers recorded beforehand:

    python examples/topology_sources.py

Here the paths of all ranks make a topology. In a job, each rank gives a function that finds its own, and if that fails
on one rank, all hear what is wrong there: Checkpointer(url, topology=lambda: fastckpt.RankPath.of(*of_ray(node))).
"""

import json

from fastckpt import Topology

NODES = json.loads("""{"items": [
  {"metadata": {"name": "cn1", "labels": {"topology.kubernetes.io/zone": "z1", "example.com/rack": "r1"}}},
  {"metadata": {"name": "cn2", "labels": {"topology.kubernetes.io/zone": "z1", "example.com/rack": "r2"}}},
  {"metadata": {"name": "cn3", "labels": {"topology.kubernetes.io/zone": "z2", "example.com/rack": "r3"}}}]}""")

FABRIC = """    Fabric
        State                             : Completed
        CliqueId                          : 32766
        ClusterUUID                       : 5a4f9d1e-0e3c-4f0b-9d5e-2f1f6b1c0a77
"""

RAY_NODES = [
    {"NodeID": "a0", "Labels": {"ray.io/gpu-domain": "nvl-0"}},
    {"NodeID": "a1", "Labels": {"ray.io/gpu-domain": "nvl-0"}},
    {"NodeID": "b0", "Labels": {"ray.io/gpu-domain": "nvl-1"}},
]


def of_kubernetes(host: str, nodes: dict) -> tuple[str, ...]:
    """``nodes`` as of `kubectl get nodes -o json`. Which label is a rack's is the cluster's own choice."""
    labels = {node["metadata"]["name"]: node["metadata"]["labels"] for node in nodes["items"]}[host]
    return host, labels["example.com/rack"], labels["topology.kubernetes.io/zone"]


def of_nvlink(host: str, query: str) -> tuple[str, ...]:
    """``query`` as of `nvidia-smi -q` on that host: one NVLink domain is a cluster UUID and a clique of it."""
    facts = dict(line.split(":", 1) for line in query.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in facts.items()}
    return host, f"{found['ClusterUUID']}.{found['CliqueId']}"


def of_ray(node: dict) -> tuple[str, ...]:
    """``node`` as of `ray.nodes()`."""
    return node["NodeID"], node["Labels"]["ray.io/gpu-domain"]


if __name__ == "__main__":
    hosts = ["cn1", "cn1", "cn2", "cn2", "cn3", "cn3"]  # of ranks 0 to 5

    racks = Topology.from_paths(
        [of_kubernetes(host, NODES) for host in hosts],
        levels=("node", "rack", "zone"),
        capacities={"rack": "100 GB/s", "storage": "250 GB/s"},
    )
    print("Kubernetes:", racks, racks.to_dict()["zone"])

    domains = Topology.from_paths([of_nvlink(host, FABRIC) for host in hosts])
    print("NVLink:", domains)

    ray = Topology.from_paths([of_ray(node) for node in RAY_NODES], capacities={"supernode": "400 GB/s"})
    print("Ray:", ray, ray.to_dict()["supernode"])
