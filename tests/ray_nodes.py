"""A Ray cluster of real raylets on this machine, one line of JSON for each command on standard input.

``python tests/ray_nodes.py NODES FOLDER``: says where the head is and which process is each node's raylet. ``add`` adds
a node. It ends, with all of them, when its standard input does. The GPUs are Ray's belief only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SLOTS = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000}
EAGER = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def said(cluster: Any) -> dict[str, Any]:
    from ray._private import ray_constants

    nodes = [cluster.head_node, *cluster.worker_nodes]
    raylets = [node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid for node in nodes]
    return {"address": cluster.address, "raylets": raylets}


def main() -> None:
    from ray.cluster_utils import Cluster

    head = {**SLOTS, "include_dashboard": False, "_system_config": EAGER}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(int(sys.argv[1]) - 1):
        cluster.add_node(**SLOTS)
    print(json.dumps(said(cluster)), flush=True)
    for line in sys.stdin:
        assert line.strip() == "add"
        cluster.add_node(**SLOTS)
        print(json.dumps(said(cluster)), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["RAY_TMPDIR"] = sys.argv[2]  # before Ray is imported
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    main()
