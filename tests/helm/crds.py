"""Small schemas, written for these tests, of the fields that the chart uses of other projects' resources.

They refuse every field that they do not know. Where KEDA's own definition is at hand, KEDA_CRD names its file and it is used as well.
"""

TEXT = {"type": "string", "minLength": 1}
WHOLE = {"type": "integer", "minimum": 0}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


METADATA = closed(["name"], name=TEXT, labels=LABELS, annotations=LABELS)


def resource(api, kind, spec):
    return closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": api}, kind={"const": kind}, metadata=METADATA, spec=spec,
    )


AUTHENTICATION = closed(["name"], name=TEXT, kind={"enum": ["TriggerAuthentication", "ClusterTriggerAuthentication"]})


def trigger(kind, required, **metadata):
    """Every value of a trigger's metadata is text, numbers too."""
    texts = {name: TEXT for name in metadata["names"]}
    return closed(
        ["type", "metadata"],
        type={"const": kind}, name=TEXT, authenticationRef=AUTHENTICATION,
        metadata=closed(required, **texts),
    )


SCALED_OBJECT = resource("keda.sh/v1alpha1", "ScaledObject", closed(
    ["scaleTargetRef", "triggers"],
    scaleTargetRef=closed(["name"], apiVersion=TEXT, kind=TEXT, name=TEXT),
    pollingInterval=WHOLE, cooldownPeriod=WHOLE, minReplicaCount=WHOLE, maxReplicaCount=WHOLE,
    fallback=closed(
        ["failureThreshold", "replicas"], failureThreshold=WHOLE, replicas=WHOLE,
        behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
    ),
    advanced=closed(horizontalPodAutoscalerConfig=closed(behavior={"type": "object"})),
    triggers={"type": "array", "minItems": 1, "items": {"oneOf": [
        trigger("prometheus", ["serverAddress", "query", "threshold"], names=["serverAddress", "query", "threshold", "activationThreshold"]),
        trigger("redis-streams", ["address", "stream", "consumerGroup"], names=["address", "stream", "consumerGroup", "lagCount", "activationLagCount", "pendingEntriesCount"]),
        trigger("cron", ["timezone", "start", "end", "desiredReplicas"], names=["timezone", "start", "end", "desiredReplicas"]),
    ]}},
))

POD_MONITOR = resource("monitoring.coreos.com/v1", "PodMonitor", closed(
    ["selector", "podMetricsEndpoints"],
    selector=closed(["matchLabels"], matchLabels=LABELS),
    podMetricsEndpoints={"type": "array", "items": closed(
        ["port"], port=TEXT, path=TEXT, interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
        relabelings={"type": "array"}, metricRelabelings={"type": "array"},
    )},
))

RULE = {"oneOf": [
    closed(["alert", "expr"], **{"alert": TEXT, "expr": TEXT, "for": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}, "labels": LABELS, "annotations": LABELS}),
    closed(["record", "expr"], record=TEXT, expr=TEXT, labels=LABELS),
]}
PROMETHEUS_RULE = resource("monitoring.coreos.com/v1", "PrometheusRule", closed(
    ["groups"], groups={"type": "array", "minItems": 1, "items": closed(["name", "rules"], name=TEXT, rules={"type": "array", "minItems": 1, "items": RULE})},
))

SCHEMAS = {"ScaledObject": SCALED_OBJECT, "PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}
