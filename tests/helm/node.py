"""A stand-in for a node, for a control plane that has none: it says that pods run, and runs nothing.

Pods of jobs and of tests are said to have succeeded. Everything else of the cluster (scheduling aside) is the real one: the API server
checks and keeps the objects, and its controllers roll deployments, count budgets and remove what nobody owns.
"""

import threading
import time

NAME = "stand-in"
LOOK_EVERY = 0.2


class Node(threading.Thread):
    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.ended = server, threading.Event()

    def run(self):
        self.server.ask("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME}})
        while not self.ended.wait(LOOK_EVERY):
            self.server.patch(f"/api/v1/nodes/{NAME}/status", {"status": status_of_node()})
            for pod in self.server.items("/api/v1/pods"):
                # One that is gone by now is looked at no more.
                try:
                    self.look_after(pod)
                except RuntimeError as error:
                    if " 409 " not in str(error):
                        raise

    def look_after(self, pod):
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        if not pod["spec"].get("nodeName"):
            self.server.ask("POST", f"{path}/binding", {
                "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]},
                "target": {"apiVersion": "v1", "kind": "Node", "name": NAME},
            })
        elif pod["metadata"].get("deletionTimestamp"):
            self.server.ask("DELETE", f"{path}?gracePeriodSeconds=0")
        elif pod["status"]["phase"] == "Pending":
            self.server.patch(f"{path}/status", {"status": status_of_pod(pod)})

    def end(self):
        self.ended.set()
        self.join()
        self.server.ask("DELETE", f"/api/v1/nodes/{NAME}")


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def status_of_node():
    room = {"cpu": "64", "memory": "64Gi", "pods": "110"}
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": "", "lastHeartbeatTime": now(), "lastTransitionTime": now()}
    return {"capacity": room, "allocatable": room, "conditions": [ready]}


def status_of_pod(pod):
    succeeds = pod["spec"]["restartPolicy"] == "Never"
    state = {"terminated": {"exitCode": 0, "startedAt": now(), "finishedAt": now()}} if succeeds else {"running": {"startedAt": now()}}
    ready = "False" if succeeds else "True"
    return {
        "phase": "Succeeded" if succeeds else "Running", "podIP": "127.0.0.1", "startTime": now(),
        "conditions": [{"type": kind, "status": ready, "lastTransitionTime": now()} for kind in ("Ready", "ContainersReady")],
        "containerStatuses": [
            {"name": container["name"], "ready": not succeeds, "restartCount": 0, "image": container["image"], "imageID": "none", "state": state}
            for container in pod["spec"]["containers"]
        ],
    }
