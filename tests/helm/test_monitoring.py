"""The alerts, the runbooks and the dashboard: they fit together, and name only metrics that exist."""

import json
import re

import promql_parser
import pytest
import yaml

from chart import CHART, ROOT, ci_values, objects

RULES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "rules").glob("*.yaml"))}
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))}
RUNBOOKS = ROOT / "docs" / "runbooks"


def metrics_of(expression):
    """The names of all metrics that an expression selects; it fails on what is no PromQL."""
    names = set()

    def walk(node):
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
        for field in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, field, None)
            if child is not None and not isinstance(child, (str, int, float)):
                walk(child)
        for child in getattr(node, "args", None) or []:
            walk(child)

    walk(promql_parser.parse(expression))
    return names


def contract():
    """Every metric as Prometheus scrapes it, with the series of histograms: from the generated tables of docs/telemetry.md."""
    names = set()
    for line in (ROOT / "docs" / "telemetry.md").read_text().splitlines():
        found = re.match(r"\| `(tidegate_\w+)` \| `[^`]+` \| (\w+)", line)
        if found:
            name, kind = found.groups()
            names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions():
    for name, rule in RULES.items():
        for group in rule["groups"]:
            for each in group["rules"]:
                yield f"rule {name}", each["expr"]
    for name, dashboard in DASHBOARDS.items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "1m").replace("$namespace", ".*").replace("$pipeline", ".*")
                yield f"{name}: {panel['title']}", expression
    for values in ("keda", "keda-to-zero"):
        yield values, objects(ci_values(values), "ScaledObject")[0]["spec"]["triggers"][0]["metadata"]["query"]


@pytest.mark.parametrize("expression", [pytest.param(text, id=name) for name, text in expressions()])
def test_each_expression_is_promql_over_metrics_that_exist(expression):
    names = metrics_of(expression)
    assert names
    assert names <= contract(), names - contract()


def test_what_is_no_promql_is_noticed():
    with pytest.raises(ValueError):
        metrics_of("sum by (pipeline (tidegate_backlog_entries)")
    assert metrics_of("max(a) > 0 and on (pipeline) sum(rate(b_total[5m])) == 0") == {"a", "b_total"}
    assert metrics_of("histogram_quantile(0.9, sum by (le) (rate(c_bucket[5m])))") == {"c_bucket"}


def test_each_rule_is_one_alert_in_a_file_of_its_name_with_a_severity_and_its_runbook():
    assert RULES
    for name, rule in RULES.items():
        [group] = rule["groups"]
        [alert] = group["rules"]
        assert alert["alert"] == group["name"] == name
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["runbook"] == f"docs/runbooks/{name}.md"
        assert alert["annotations"]["summary"] and alert["annotations"]["description"]


def test_each_runbook_has_its_alert_and_its_four_sections():
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(RULES)
    for name in RULES:
        text = (RUNBOOKS / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert (RUNBOOKS / target).is_file(), f"{name} links to {target}"


def test_each_alert_is_seen_to_fire_by_promtool():
    tested = (ROOT / "tests" / "alerts" / "alerts.test.yaml").read_text()
    for name in RULES:
        assert name in tested, f"tests/alerts/alerts.test.yaml does not test {name}"


def test_the_chart_has_the_same_rules():
    values = ci_values("keda-to-zero")
    values["prometheusRule"] = {"enabled": True}
    [rendered] = objects(values, "PrometheusRule")
    assert rendered["spec"]["groups"] == [group for rule in RULES.values() for group in rule["groups"]]


def test_rules_can_be_left_out_and_labelled():
    [rendered] = objects(ci_values("production"), "PrometheusRule")
    alerts = {rule["alert"]: rule for group in rendered["spec"]["groups"] for rule in group["rules"]}
    assert set(alerts) == set(RULES) - {"TidegateDown"}
    halted = alerts["TidegateHalted"]
    assert halted["labels"] == {"severity": "critical", "team": "data"}
    assert halted["annotations"]["runbook_url"] == "https://runbooks.example/tidegate/TidegateHalted.md"


def test_the_chart_has_the_same_dashboard():
    [rendered] = [each for each in objects(ci_values("production"), "ConfigMap") if each["metadata"]["name"].endswith("-dashboard")]
    assert {name: json.loads(text) for name, text in rendered["data"].items()} == {f"{name}.json": text for name, text in DASHBOARDS.items()}


def test_the_dashboard_is_laid_out_and_knows_its_data_source():
    for dashboard in DASHBOARDS.values():
        identities = [panel["id"] for panel in dashboard["panels"]]
        assert len(identities) == len(set(identities))
        taken = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
            assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
            taken |= cells
        for panel in panels(dashboard):
            assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"], panel["title"]
