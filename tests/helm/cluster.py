"""The chart on the API server that KUBECONFIG names: installed, upgraded, scaled, rolled back and removed. `make kubernetes-test`.

It is for a control plane without nodes. With TIDEGATE_IMAGE, an image of the Docker engine that is there, pods run as containers beside a Valkey, a
PostgreSQL and a producer (containers.py), and in the end every counter is compared. Without it a stand-in says that pods run (node.py): then what is tested is
what the API server, its admission and its controllers make of the chart. With KEDA_CRD (a file) a ScaledObject is created as well.
"""

import os
import sys
import threading
import time

import helm_python as helm
import yaml

from apiserver import from_environment
from chart import CHART, ci_values
from containers import ContainerNode, Servers
from node import Node

NAMESPACE, RELEASE, LIMIT = "tidegate-test", "under-test", 120
IMAGE = os.environ.get("TIDEGATE_IMAGE")
NAME = "under-test-tidegate"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=app.kubernetes.io/instance%3D{RELEASE},app.kubernetes.io/component%3Dworker"
KINDS = {
    "/api/v1": ["configmaps", "secrets", "services", "serviceaccounts", "pods"], "/apis/apps/v1": ["deployments", "replicasets"], "/apis/batch/v1": ["jobs"],
    "/apis/networking.k8s.io/v1": ["networkpolicies"], "/apis/policy/v1": ["poddisruptionbudgets"], "/apis/policy/v1beta1": ["poddisruptionbudgets"],
    "/apis/autoscaling/v1": ["horizontalpodautoscalers"],
}


def say(text):
    print(f"kubernetes: {text}", flush=True)


def eventually(what, holds):
    deadline = time.monotonic() + LIMIT
    while not holds():
        if time.monotonic() > deadline:
            sys.exit(f"kubernetes: failed: {what}: not within {LIMIT} s")
        time.sleep(0.2)


class Watch(threading.Thread):
    """Looks at the workers while something happens: how few were ready, and of how many templates at once."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.ended, self.fewest, self.templates = server, threading.Event(), 99, set()
        self.start()

    def run(self):
        while not self.ended.wait(0.1):
            ready = [pod for pod in self.server.items(PODS) if is_ready(pod)]
            self.fewest = min(self.fewest, len(ready))
            self.templates.add(len({pod["metadata"]["labels"]["pod-template-hash"] for pod in ready}))

    def end(self):
        self.ended.set()
        self.join()
        return self


def is_ready(pod):
    conditions = pod["status"].get("conditions", [])
    return not pod["metadata"].get("deletionTimestamp") and any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def main():
    server = from_environment()
    version = server.get("/version")["gitVersion"]
    if server.items("/api/v1/nodes"):
        return say(f"skipped: the API server ({version}) has nodes, and the test brings a stand-in for one")
    servers = Servers() if IMAGE else None
    if servers:
        servers.start()
    node = ContainerNode(server, servers.network) if servers else Node(server)
    node.start()
    config = helm.Config(kubeconfig_path=os.environ["KUBECONFIG"], namespace=NAMESPACE)
    try:
        walk_through(server, config, version, servers)
        say("passed")
    finally:
        config.uninstall(RELEASE, ignore_not_found=True)
        server.ask("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
        node.end()
        if servers:
            servers.end()


def walk_through(server, config, version, servers):
    values = {**ci_values("minimal"), "replicaCount": 2}
    if IMAGE:
        repository, tag = IMAGE.rsplit(":", 1)
        values["image"] = {"repository": repository, "tag": tag, "pullPolicy": "Never"}
    release = config.install(str(CHART), RELEASE, values, create_namespace=True, wait="watcher", timeout=LIMIT)
    assert release["status"] == "deployed", release
    ready = lambda: len([pod for pod in server.items(PODS) if is_ready(pod)])
    assert ready() == 2
    assert not server.get(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/{NAME}-migrate"), "the job is still there"
    [budget] = server.items(f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets") or server.items(f"/apis/policy/v1beta1/namespaces/{NAMESPACE}/poddisruptionbudgets")
    eventually("the budget sees both workers", lambda: budget_of(server)["status"].get("currentHealthy") == 2)
    say(f"installed on Kubernetes {version}: two workers, migrated before, budget {budget_of(server)['apiVersion']}")

    result = config.test(RELEASE, timeout=LIMIT)
    assert result["release"]["status"] == "deployed", result
    say("helm test: one delta landed exactly once" if IMAGE else "helm test ran its pod (which the stand-in says to have succeeded)")

    watch = Watch(server)
    config.upgrade(str(CHART), RELEASE, {**values, "config": {"run": {"workers": 3}}}, wait="watcher", timeout=LIMIT)
    eventually("the old workers are gone", lambda: len(server.items(PODS)) == 2)
    watch.end()
    assert watch.fewest >= 2 and max(watch.templates) == 2, (watch.fewest, watch.templates)
    say("upgraded: old and new workers were ready side by side, and never fewer than two of them")

    config.upgrade(str(CHART), RELEASE, {**values, "replicaCount": 4}, wait="watcher", timeout=LIMIT)
    eventually("four workers", lambda: ready() == 4)
    server.ask("PATCH", f"{DEPLOYMENT}/scale", {"spec": {"replicas": 1}}, "application/merge-patch+json")
    eventually("one worker", lambda: len(server.items(PODS)) == 1)
    say("scaled to four and to one")

    scaled = {**values, "autoscaling": {"enabled": True}}
    config.upgrade(str(CHART), RELEASE, scaled, wait="watcher", timeout=LIMIT)
    [autoscaler] = server.items(f"/apis/autoscaling/v1/namespaces/{NAMESPACE}/horizontalpodautoscalers")
    assert (autoscaler["spec"]["minReplicas"], autoscaler["spec"]["maxReplicas"]) == (2, 6)
    # It raises them to its minimum by itself: the chart no longer says how many there are.
    eventually("the autoscaler's minimum", lambda: server.get(DEPLOYMENT)["spec"]["replicas"] == 2)
    say("autoscaled: the autoscaler is accepted and sets the number of workers")

    if "KEDA_CRD" in os.environ:
        definition = next(yaml.safe_load_all(open(os.environ["KEDA_CRD"])))
        if not server.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/scaledobjects.keda.sh"):
            server.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        path = f"/apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects/{NAME}"
        eventually("KEDA's definition", lambda: server.get("/apis/keda.sh/v1alpha1"))
        config.upgrade(str(CHART), RELEASE, {**values, "keda": ci_values("keda-to-zero")["keda"]}, timeout=LIMIT)
        written = server.get(path)["spec"]
        assert written["minReplicaCount"] == 0 and len(written["triggers"]) == 6, written
        say("the ScaledObject is accepted by KEDA's definition, and nothing of it was dropped")

    config.rollback(RELEASE, version=1, wait="watcher", timeout=LIMIT)
    eventually("two workers again", lambda: ready() == 2)
    say("rolled back to the first revision")

    if servers:
        servers.compose("stop", "--timeout", "5", "producer")
        eventually("every counter is equal", lambda: servers.in_valkey() == servers.in_postgresql())
        say(f"{len(servers.in_valkey())} counters are equal in Valkey and PostgreSQL after all that")

    config.uninstall(RELEASE, wait="watcher", timeout=LIMIT)
    eventually("nothing is left", lambda: not left(server))
    say("removed: nothing of the release is left")


def budget_of(server):
    for api in ("policy/v1", "policy/v1beta1"):
        found = server.get(f"/apis/{api}/namespaces/{NAMESPACE}/poddisruptionbudgets/{NAME}")
        if found:
            return found


def left(server):
    label = f"labelSelector=app.kubernetes.io/instance%3D{RELEASE}"
    found = [item["metadata"]["name"] for api, kinds in KINDS.items() for kind in kinds for item in server.items(f"{api}/namespaces/{NAMESPACE}/{kind}?{label}")]
    # A pod of `helm test` is no part of the release.
    return [name for name in found if not name.endswith("-probe")]


if __name__ == "__main__":
    main()
