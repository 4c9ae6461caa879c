"""A small client of a Kubernetes API server, for the cluster that KUBECONFIG names."""

import base64
import json
import os
import ssl
import tempfile
import urllib.error
import urllib.request

import yaml


class ApiServer:
    """The server of the current context. It knows tokens, client certificates and certificates of authorities."""

    def __init__(self, path):
        config = yaml.safe_load(open(path))
        by_name = lambda kind: {each["name"]: each[kind.rstrip("s")] for each in config[kind]}
        context = by_name("contexts")[config["current-context"]]
        cluster, user = by_name("clusters")[context["cluster"]], by_name("users")[context["user"]]
        self.url = cluster["server"]
        self.headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self.tls = ssl.create_default_context()
        if cluster.get("insecure-skip-tls-verify"):
            self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        elif "certificate-authority-data" in cluster:
            self.tls.load_verify_locations(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        elif "certificate-authority" in cluster:
            self.tls.load_verify_locations(cluster["certificate-authority"])
        if "client-certificate-data" in user:
            with tempfile.NamedTemporaryFile("wb", suffix=".pem") as pem:
                pem.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
                pem.flush()
                self.tls.load_cert_chain(pem.name)
        elif "client-certificate" in user:
            self.tls.load_cert_chain(user["client-certificate"], user["client-key"])

    def ask(self, method, path, body=None, kind="application/json"):
        """The answer as JSON. None where there is no such thing."""
        request = urllib.request.Request(
            self.url + path, method=method, data=None if body is None else json.dumps(body).encode(), headers={**self.headers, "Content-Type": kind}
        )
        try:
            return json.load(urllib.request.urlopen(request, context=self.tls, timeout=30))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise RuntimeError(f"{method} {path}: {error.code} {error.read().decode()[:500]}") from None

    def get(self, path):
        return self.ask("GET", path)

    def items(self, path):
        return (self.get(path) or {}).get("items") or []

    def patch(self, path, body):
        return self.ask("PATCH", path, body, "application/strategic-merge-patch+json")


def from_environment():
    return ApiServer(os.environ["KUBECONFIG"].split(os.pathsep)[0])
