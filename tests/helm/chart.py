"""The chart, rendered by the Helm library for each file of values in helm/tidegate/ci."""

import copy
from pathlib import Path

import helm_python as helm
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "tidegate"
CI = sorted((CHART / "ci").glob("*-values.yaml"))
helm.disable_logging()


def ci_values(name):
    """The values of one file, a copy of one's own."""
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())


def render(values, release="release", namespace="namespace", **options):
    """All objects that an installation with these values makes, and the notes."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(copy.deepcopy(values), name=release, namespace=namespace, **options)
    notes = next((text for path, text in files.items() if path.endswith("NOTES.txt")), "")
    objects = [
        document
        for path, text in files.items()
        if not path.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document
    ]
    return objects, notes


def objects(values, kind, **options):
    return [each for each in render(values, **options)[0] if each["kind"] == kind]


def one(values, kind, **options):
    """The only object of a kind that is no hook."""
    found = [each for each in objects(values, kind, **options) if not is_hook(each)]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def is_hook(each):
    return "helm.sh/hook" in each["metadata"].get("annotations", {})


def pods(rendered):
    """The name and specification of each pod that these objects make."""
    for each in rendered:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, each["spec"]
        elif each["kind"] in ("Deployment", "Job"):
            yield name, each["spec"]["template"]["spec"]
