"""A node whose pods run: each one as a container of the Docker engine that is there, beside the Valkey and PostgreSQL of docker-compose.yml.

A small kubelet: it gives a container what the pod's specification says (arguments, environment, mounts of ConfigMaps and Secrets, user, a read-only root, no
capabilities), tells the API server what becomes of it, and stops it with the pod's grace period. Readiness is asked of the program itself, for the containers'
network is not the test's.
"""

import base64
import os
import subprocess
import tempfile
from pathlib import Path

from chart import ROOT
from node import Node, now


def docker(*arguments, check=True):
    return subprocess.run(["docker", *arguments], check=check, capture_output=True, text=True).stdout.strip()


class Servers:
    """Valkey, PostgreSQL and the producer of docker-compose.yml, with the password of ci/minimal-values.yaml."""

    def __init__(self):
        self.project = f"tidegate-kubernetes-{os.getpid()}"
        self.network = f"{self.project}_default"

    def compose(self, *arguments):
        environment = {**os.environ, "POSTGRES_PASSWORD": "only-for-this-test"}
        command = ["docker", "compose", "--project-name", self.project, "--file", str(ROOT / "docker-compose.yml"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    def start(self):
        self.compose("up", "--detach", "--wait", "valkey", "postgres", "producer")

    def in_valkey(self):
        script = "local t = {} for _, k in ipairs(redis.call('KEYS', 'counter:*')) do t[#t + 1] = string.sub(k, 9) .. ' ' .. redis.call('GET', k) end return t"
        return sorted(self.compose("exec", "-T", "valkey", "valkey-cli", "--raw", "eval", script, "0").splitlines())

    def in_postgresql(self):
        query = ["psql", "--username", "app", "--no-align", "--tuples-only", "--field-separator", " ", "--command", "select id, value from counters"]
        return sorted(self.compose("exec", "-T", "--env", "PGPASSWORD=only-for-this-test", "postgres", *query).splitlines())

    def end(self):
        self.compose("down", "--volumes", "--timeout", "2")


class ContainerNode(Node):
    def __init__(self, server, network):
        super().__init__(server)
        self.network, self.containers = network, {}

    def look_after(self, pod):
        uid = pod["metadata"]["uid"]
        if pod["metadata"].get("deletionTimestamp"):
            # A pod that is told to go is given its time; the node looks at others meanwhile.
            if uid in self.containers and docker("inspect", "--format", "{{.State.Running}}", self.containers[uid]) == "true":
                grace = pod["metadata"].get("deletionGracePeriodSeconds", 30)
                return subprocess.Popen(["docker", "stop", "--time", str(grace), self.containers[uid]], stdout=subprocess.DEVNULL)
            if uid in self.containers:
                docker("rm", "--force", self.containers.pop(uid))
            return super().look_after(pod)
        if not pod["spec"].get("nodeName"):
            return super().look_after(pod)
        if uid not in self.containers:
            self.containers[uid] = self.start_container(pod)
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}/status"
        self.server.patch(path, {"status": self.status_of(pod, self.containers[uid])})

    def start_container(self, pod):
        [container] = pod["spec"]["containers"]
        context = {**pod["spec"].get("securityContext", {}), **container["securityContext"]}
        command = ["run", "--detach", "--network", self.network, "--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
        if context["readOnlyRootFilesystem"]:
            command.append("--read-only")
        for capability in context["capabilities"]["drop"]:
            command += ["--cap-drop", capability]
        command += ["--security-opt", f"no-new-privileges:{str(not context['allowPrivilegeEscalation']).lower()}"]
        for variable in container.get("env", []):
            command += ["--env", f"{variable['name']}={variable['value']}"]
        folders = {volume["name"]: self.folder_of(pod, volume) for volume in pod["spec"].get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            command += ["--volume", f"{folders[mount['name']]}:{mount['mountPath']}:ro"]
        return docker(*command, container["image"], *container.get("args", []))

    def folder_of(self, pod, volume):
        """The files of a ConfigMap, a Secret or several of them."""
        folder = Path(tempfile.mkdtemp(prefix="tidegate-volume-"))
        folder.chmod(0o755)
        namespace = f"/api/v1/namespaces/{pod['metadata']['namespace']}"
        sources = volume.get("projected", {}).get("sources") or [volume]
        for source in sources:
            if "configMap" in source:
                files = self.server.get(f"{namespace}/configmaps/{source['configMap']['name']}")["data"]
            else:
                secret = source["secret"]
                data = self.server.get(f"{namespace}/secrets/{secret.get('name') or secret['secretName']}")["data"]
                files = {item["path"]: base64.b64decode(data[item["key"]]).decode() for item in secret["items"]}
            for name, text in files.items():
                (folder / name).write_text(text)
        return folder

    def status_of(self, pod, container):
        running, code = docker("inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", container).split()
        [spec] = pod["spec"]["containers"]
        is_once = pod["spec"]["restartPolicy"] == "Never"
        is_running = running == "true"
        is_ready = is_running and (is_once or self.is_ready(container))
        phase = "Running" if is_running else "Succeeded" if code == "0" else "Failed"
        state = {"running": {"startedAt": now()}} if is_running else {"terminated": {"exitCode": int(code), "startedAt": now(), "finishedAt": now()}}
        ready = "True" if is_ready else "False"
        return {
            "phase": phase, "podIP": "127.0.0.1", "startTime": now(),
            "conditions": [{"type": kind, "status": ready, "lastTransitionTime": now()} for kind in ("Ready", "ContainersReady")],
            "containerStatuses": [{"name": spec["name"], "ready": is_ready, "restartCount": 0, "image": spec["image"], "imageID": "none", "state": state}],
        }

    def is_ready(self, container):
        return subprocess.run(["docker", "exec", container, "/usr/bin/tidegate", "health"], capture_output=True).returncode == 0

    def end(self):
        super().end()
        for container in self.containers.values():
            docker("rm", "--force", container, check=False)
