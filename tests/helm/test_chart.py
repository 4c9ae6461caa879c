"""What the chart renders: valid for Kubernetes, as restricted as it promises, and what its values say."""

import os
import tomllib

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from chart import CHART, CI, ROOT, ci_values, is_hook, objects, one, pods, render
from crds import SCHEMAS
from restricted import violations

KUBERNETES = "1.37"
every_ci_file = pytest.mark.parametrize("values", [yaml.safe_load(path.read_text()) for path in CI], ids=[path.stem for path in CI])


@every_ci_file
def test_the_chart_has_no_lint(values):
    result = helm.lint(CHART, values, strict=True)
    assert not result["errors"], result


@every_ci_file
def test_each_object_is_valid(values):
    rendered, _ = render(values)
    assert rendered
    for each in rendered:
        schema = SCHEMAS.get(each["kind"])
        if schema:
            jsonschema.validate(each, schema)
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


@every_ci_file
@pytest.mark.skipif("KEDA_CRD" not in os.environ, reason="KEDA_CRD names no file with KEDA's definition of a ScaledObject")
def test_a_scaled_object_is_valid_for_keda_itself(values):
    definition = next(yaml.safe_load_all(open(os.environ["KEDA_CRD"])))
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for each in objects(values, "ScaledObject"):
        jsonschema.validate(each, closed(schema))


def closed(schema):
    """An API server drops fields that a definition does not know; here they are refused."""
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    # "metadata" is defined as any object.
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    return schema


@every_ci_file
def test_each_pod_is_restricted(values):
    found = list(pods(render(values)[0]))
    assert found
    for name, spec in found:
        assert violations(spec) == [], name
        assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            if container["name"] != "sidecar":
                assert container["securityContext"]["readOnlyRootFilesystem"] is True, name


def test_the_check_of_restricted_pods_notices_each_violation():
    spec = dict(pods(render(ci_values("minimal"))[0]))["Deployment release-tidegate"]
    good = spec["containers"][0]["securityContext"]
    for change in (
        {"allowPrivilegeEscalation": True}, {"capabilities": {}}, {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}},
        {"runAsNonRoot": False}, {"runAsUser": 0}, {"privileged": True}, {"seccompProfile": {"type": "Unconfined"}}, {"procMount": "Unmasked"},
    ):
        spec["containers"][0]["securityContext"] = {**good, **change}
        assert violations(spec), change
    spec["containers"][0]["securityContext"] = good
    assert violations({**spec, "hostNetwork": True})
    assert violations({**spec, "volumes": [{"name": "root", "hostPath": {"path": "/"}}]})
    assert violations(spec) == []


@every_ci_file
def test_the_configuration_file_is_what_the_values_say(values):
    written = tomllib.loads(configuration(values))
    for server in ("valkey", "postgres"):
        assert written[server].pop("url_file") == f"/etc/tidegate/urls/{server}-url"
    assert {name: section for name, section in written.items() if section} == {"log": {"format": "json"}, **values.get("config", {})}


def configuration(values):
    maps = [each for each in objects(values, "ConfigMap") if not is_hook(each) and "tidegate.toml" in each["data"]]
    assert len(maps) == 1
    return maps[0]["data"]["tidegate.toml"]


@every_ci_file
def test_what_a_pod_mounts_is_there(values):
    """Every volume is mounted, every mount has a volume, and a ConfigMap or Secret that the chart names is made by it or named in the values."""
    rendered, _ = render(values)
    made = {(each["kind"], each["metadata"]["name"]) for each in rendered}
    hooks = {(each["kind"], each["metadata"]["name"]) for each in rendered if is_hook(each)}
    given = yaml.safe_dump(values)
    for name, spec in pods(rendered):
        mounts = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert mounts == volumes, name
        for kind, source in sources(spec):
            assert (kind, source) in made or source in given, f"{name} needs {kind} {source}"
            if name.startswith("Job"):
                assert (kind, source) in hooks or source in given, f"{name} runs before {kind} {source} is there"


def sources(spec):
    for volume in spec["volumes"]:
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        for source in volume.get("projected", {}).get("sources", []):
            yield "Secret", source["secret"]["name"]


def test_the_job_migrates_before_any_worker_starts():
    job = objects(ci_values("production"), "Job")[0]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    spec = job["spec"]["template"]["spec"]
    assert spec["containers"][0]["args"] == ["migrate"]
    urls = next(volume for volume in spec["volumes"] if volume["name"] == "urls")["projected"]["sources"]
    assert urls[1]["secret"] == {"name": "tidegate-migrator", "items": [{"key": "url", "path": "postgres-url"}]}
    weights = [int(each["metadata"]["annotations"]["helm.sh/hook-weight"]) for each in render(ci_values("minimal"))[0] if is_hook(each) and each["kind"] in ("ConfigMap", "Secret")]
    assert len(weights) == 2 and max(weights) < int(job["metadata"]["annotations"]["helm.sh/hook-weight"])
    assert objects(ci_values("single"), "Job") == []


def test_a_worker_has_more_time_to_end_than_it_needs():
    def period(values):
        return one(values, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]

    minimal = ci_values("minimal")
    assert period(minimal) == 35
    for grace, expected in (("1m 30s", 100), ("1500ms", 12), ("2min", 130), ("1h", 3610)):
        assert period({**minimal, "config": {"stop": {"grace": grace}}}) == expected
    assert period({**minimal, "terminationGracePeriodSeconds": 60}) == 60
    with pytest.raises(helm.HelmError, match="killed before it has settled"):
        render({**minimal, "terminationGracePeriodSeconds": 25})


def test_a_changed_configuration_or_url_changes_the_pods():
    def annotations(values):
        return one(values, "Deployment")["spec"]["template"]["metadata"]["annotations"]

    minimal = ci_values("minimal")
    assert annotations(minimal) == annotations(minimal)
    assert annotations(minimal) != annotations({**minimal, "config": {"run": {"workers": 3}}})
    assert annotations(minimal) != annotations({**minimal, "urls": {**minimal["urls"], "valkey": "valkey://other"}})


@pytest.mark.parametrize("change, message", [
    ({"urls": {}}, "set urls.existingSecret"),
    ({"urls": {"valkey": "valkey://v"}}, "set urls.existingSecret"),
    ({"urls": {"existingSecret": "urls", "postgres": "postgres://p"}}, "set one or the other"),
    ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "exclude each other"),
    ({"keda": {"enabled": True, "scaleToZero": {"enabled": True}}}, "needs keda.scaleToZero.address"),
    ({"tls": {"existingSecret": "a", "existingConfigMap": "b"}}, "not both"),
    ({"config": {"stop": {"grace": "1m30s 5weeks"}}}, "grace"),
    # The schema.
    ({"replicas": 3}, "replicas"),
    ({"image": {"tagg": "1"}}, "tagg"),
    ({"config": {"batch": {"max_entrys": 5}}}, "max_entrys"),
    ({"config": {"bacth": {}}}, "bacth"),
    ({"config": {"run": {"workers": "2"}}}, "workers"),
    ({"config": {"run": {"workers": 0}}}, "workers"),
    ({"config": {"log": {"format": "xml"}}}, "format"),
    ({"config": {"trim": {"retention": 3600}}}, "retention"),
    ({"config": {"valkey": {"url": "valkey://user:hunter2@host"}}}, "url"),
    ({"config": {"pipelines": {"1st": {}}}}, "1st"),
    ({"config": {"doctor": {"accept": [{"finding": "D1", "until": "2027-01-31"}]}}}, "reason"),
    ({"config": {"doctor": {"accept": [{"finding": "D9", "until": "2027-01-31", "reason": "x"}]}}}, "finding"),
    ({"config": {"doctor": {"accept": [{"finding": "D1", "until": "soon", "reason": "x"}]}}}, "until"),
    ({"urls": {"postgres": "mysql://p", "valkey": "valkey://v"}}, "postgres"),
    ({"image": {"digest": "latest"}}, "digest"),
])
def test_a_mistake_is_refused_by_name(change, message):
    values = ci_values("minimal")
    values.update(change)
    with pytest.raises(helm.HelmError, match=message) as refused:
        render(values)
    assert "hunter2" not in str(refused.value)


def test_every_value_has_a_default_and_a_schema():
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    free = {"global", "config"}

    def compare(path, given, schema):
        properties = schema.get("properties")
        if not properties or path in free:
            return
        # What may be left out of a probe or a reference is up to Kubernetes.
        optional = {"initialDelaySeconds", "successThreshold", "global"} if not path.endswith("authenticationRef") else set(properties)
        assert set(given) <= set(properties) and set(properties) - optional <= set(given), path
        for key, value in given.items():
            if isinstance(value, dict):
                compare(f"{path}.{key}".strip("."), value, properties[key])

    compare("", values, schema)


def test_a_number_of_processes_is_set_by_one_only():
    assert one(ci_values("production"), "Deployment")["spec"]["replicas"] == 3
    for scaled in ("hpa", "keda", "keda-to-zero"):
        assert "replicas" not in one(ci_values(scaled), "Deployment")["spec"]


def test_the_network_policy_lets_through_what_is_needed():
    policy = one(ci_values("extras"), "NetworkPolicy")["spec"]
    ports = [port["port"] for port in policy["egress"][1]["ports"]]
    assert ports == [6379, 26379, 5432, 6432, 16380, 16432]
    assert policy["ingress"][0]["ports"] == [{"port": 9464, "protocol": "TCP"}]
    production = one(ci_values("production"), "NetworkPolicy")["spec"]
    assert "to" in production["egress"][1] and "from" in production["ingress"][0]
    selected = policy["podSelector"]["matchLabels"].items()
    for each in objects(ci_values("extras"), "Deployment") + objects(ci_values("extras"), "Job"):
        assert selected <= each["spec"]["template"]["metadata"]["labels"].items()


@every_ci_file
def test_every_selector_finds_the_workers_and_nothing_else(values):
    rendered, _ = render(values)
    worker = next(each for each in rendered if each["kind"] == "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    others = [each["spec"]["template"]["metadata"]["labels"].items() for each in rendered if each["kind"] == "Job"]
    others += [each["metadata"]["labels"].items() for each in rendered if each["kind"] == "Pod"]
    for each in rendered:
        if each["kind"] in ("PodDisruptionBudget", "PodMonitor", "Deployment"):
            selector = each["spec"]["selector"]["matchLabels"].items()
        elif each["kind"] == "Service":
            selector = each["spec"]["selector"].items()
        else:
            continue
        assert selector <= worker and not any(selector <= other for other in others), each["kind"]


def test_the_scaled_object_counts_each_backlog_once_and_can_come_back_from_zero():
    to_zero = one(ci_values("keda-to-zero"), "ScaledObject")["spec"]
    assert (to_zero["minReplicaCount"], to_zero["maxReplicaCount"]) == (0, 4)
    kinds = [trigger["type"] for trigger in to_zero["triggers"]]
    # Undelivered and pending of each stream, and a time at which a process looks itself: Valkey cannot always tell a lag.
    assert kinds == ["prometheus", "redis-streams", "redis-streams", "redis-streams", "redis-streams", "cron"]
    assert to_zero["triggers"][2]["metadata"]["pendingEntriesCount"] == "100000"
    above = one(ci_values("keda"), "ScaledObject")["spec"]
    assert above["minReplicaCount"] == 2 and len(above["triggers"]) == 1
    query = above["triggers"][0]["metadata"]["query"]
    assert query == 'sum(max by (pipeline) (tidegate_backlog_entries{namespace="namespace", pod=~"release-tidegate-.*"})) or vector(0)'
    # What it gives is seen by promtool.
    assert (ROOT / "tests" / "alerts" / "alerts.test.yaml").read_text().count(query) == 2


def test_the_notes_have_the_next_command_and_warn():
    def notes(name, **change):
        return render({**ci_values(name), **change})[1]

    assert "helm test release --namespace namespace" in notes("minimal")
    assert "everysec" in notes("production") and "WARNING" not in notes("production")
    assert "One replica" in notes("single") and "No PodDisruptionBudget" in notes("single") and "Migrations are switched off" in notes("single")
    assert "passwords, are values of this release" in notes("minimal")
    assert "only-for-this-test" not in notes("minimal")
    zero = ci_values("keda-to-zero")["keda"]
    zero["scaleToZero"]["wake"] = {"enabled": False}
    assert "Nothing wakes a process" in notes("keda-to-zero", keda=zero)


def test_the_test_pod_uses_the_producers_url():
    [pod] = objects(ci_values("production"), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["containers"][0]["args"][:5] == ["probe", "--pipeline", "page-views", "--key", "tidegate-probe"]
    urls = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "urls")["projected"]["sources"]
    assert [source["secret"]["name"] for source in urls] == ["tidegate-producer", "tidegate-urls"]


def test_long_and_odd_names_of_releases_work():
    for release in ("a" * 53, "tidegate", "x.y"):
        for each in render(ci_values("minimal"), release=release)[0]:
            assert len(each["metadata"]["name"]) <= 63
            if each["kind"] not in ("Secret", "ConfigMap"):
                kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_the_chart_is_of_the_programs_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    program = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    assert chart["appVersion"] == program
    assert f"ARG VERSION={program}\n" in (ROOT / "Dockerfile").read_text()
