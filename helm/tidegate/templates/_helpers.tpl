{{- define "tidegate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "tidegate.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- $name := include "tidegate.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tidegate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tidegate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tidegate.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "tidegate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tidegate.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "tidegate.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "tidegate.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* What contradicts itself is refused here, with the next step. */}}
{{- define "tidegate.checkValues" -}}
{{- $urls := .Values.urls }}
{{- if and $urls.existingSecret (or $urls.valkey $urls.postgres) }}
{{- fail "urls.existingSecret is set, and urls.valkey or urls.postgres too: set one or the other" }}
{{- end }}
{{- if not $urls.existingSecret }}
{{- if not (and $urls.valkey $urls.postgres) }}
{{- fail "set urls.existingSecret to a Secret with the keys valkey-url and postgres-url, or set urls.valkey and urls.postgres" }}
{{- end }}
{{- end }}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled }}
{{- fail "autoscaling.enabled and keda.enabled exclude each other: KEDA makes a HorizontalPodAutoscaler of its own" }}
{{- end }}
{{- if and .Values.keda.enabled .Values.keda.scaleToZero.enabled (not .Values.keda.scaleToZero.address) }}
{{- fail "keda.scaleToZero.enabled needs keda.scaleToZero.address: host:port of Valkey, which KEDA asks while no process runs" }}
{{- end }}
{{- if and .Values.tls.existingSecret .Values.tls.existingConfigMap }}
{{- fail "set tls.existingSecret or tls.existingConfigMap, not both" }}
{{- end }}
{{- end }}

{{/* A duration of the configuration, such as "1m 30s", in whole seconds, rounded up. */}}
{{- define "tidegate.seconds" -}}
{{- $units := dict "ms" 1 "s" 1000 "sec" 1000 "m" 60000 "min" 60000 "h" 3600000 "d" 86400000 }}
{{- $total := 0 }}
{{- range regexFindAll "[0-9]+ *[a-z]+" . -1 }}
{{- $unit := regexFind "[a-z]+" . }}
{{- if not (hasKey $units $unit) }}
{{- fail (printf "stop.grace has the unit %s, which the chart does not know: write ms, s, m, h or d" $unit) }}
{{- end }}
{{- $total = add $total (mul (regexFind "[0-9]+" . | int64) (get $units $unit)) }}
{{- end }}
{{- div (add $total 999) 1000 }}
{{- end }}

{{- define "tidegate.stopGraceSeconds" -}}
{{- include "tidegate.seconds" (dig "stop" "grace" "25s" (.Values.config | default dict)) }}
{{- end }}

{{- define "tidegate.terminationGracePeriodSeconds" -}}
{{- $grace := include "tidegate.stopGraceSeconds" . | int }}
{{- $period := .Values.terminationGracePeriodSeconds }}
{{- if kindIs "invalid" $period }}
{{- add $grace 10 }}
{{- else if le (int $period) $grace }}
{{- fail (printf "terminationGracePeriodSeconds is %d, and stop.grace is %ds: a worker would be killed before it has settled what it holds; raise the first above the second" (int $period) $grace) }}
{{- else }}
{{- int $period }}
{{- end }}
{{- end }}

{{/* One value of tidegate.toml: text in quotes, whole numbers without a fraction. */}}
{{- define "tidegate.tomlValue" -}}
{{- if kindIs "string" . -}}
{{ toJson . }}
{{- else if kindIs "bool" . -}}
{{ . }}
{{- else -}}
{{ int64 . }}
{{- end }}
{{- end }}

{{/* tidegate.toml: the sections of `config`, and where the urls are mounted. */}}
{{- define "tidegate.toml" -}}
{{- $config := deepCopy (.Values.config | default dict) }}
{{- range $section, $file := dict "valkey" "valkey-url" "postgres" "postgres-url" }}
{{- $_ := set $config $section (merge (dict "url_file" (printf "/etc/tidegate/urls/%s" $file)) (get $config $section | default dict)) }}
{{- end }}
{{- range $section, $keys := $config }}
{{- if and $keys (eq $section "pipelines") }}
{{- range $name, $keys := $keys }}

[pipelines.{{ $name }}]
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ include "tidegate.tomlValue" $value }}
{{- end }}
{{- end }}
{{- end }}
{{- else if and $keys (eq $section "doctor") }}
{{- range $acceptance := $keys.accept }}

[[doctor.accept]]
{{- range $key, $value := $acceptance }}
{{ $key }} = {{ include "tidegate.tomlValue" $value }}
{{- end }}
{{- end }}
{{- else if $keys }}

[{{ $section }}]
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ include "tidegate.tomlValue" $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The urls as two files of one folder, whatever the keys of the Secrets are called. */}}
{{- define "tidegate.urlsVolume" -}}
{{- $urls := .root.Values.urls -}}
name: urls
projected:
  defaultMode: 0440
  sources:
    - secret:
        name: {{ .valkeySecret | default $urls.existingSecret | default .madeSecret }}
        items: [{ key: {{ .valkeyKey | default $urls.valkeyKey | quote }}, path: valkey-url }]
    - secret:
        name: {{ .postgresSecret | default $urls.existingSecret | default .madeSecret }}
        items: [{ key: {{ .postgresKey | default $urls.postgresKey | quote }}, path: postgres-url }]
{{- end }}

{{/* The certificates of an authority of one's own. */}}
{{- define "tidegate.tlsVolume" -}}
name: tls
{{- if .Values.tls.existingSecret }}
secret:
  secretName: {{ .Values.tls.existingSecret }}
{{- else }}
configMap:
  name: {{ .Values.tls.existingConfigMap }}
{{- end }}
  items: [{ key: {{ .Values.tls.key | quote }}, path: ca.crt }]
{{- end }}

{{- define "tidegate.hasTls" -}}
{{- if or .Values.tls.existingSecret .Values.tls.existingConfigMap }}true{{ end }}
{{- end }}

{{/* What the containers of all pods have in common: image, environment, mounts. */}}
{{- define "tidegate.container" -}}
image: {{ include "tidegate.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
env:
  - { name: TIDEGATE_CONFIG, value: /etc/tidegate/config/tidegate.toml }
  - { name: TIDEGATE__ADMIN__LISTEN, value: "0.0.0.0:9464" }
  {{- if include "tidegate.hasTls" . }}
  - { name: SSL_CERT_FILE, value: /etc/tidegate/tls/ca.crt }
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.extraEnvFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - { name: config, mountPath: /etc/tidegate/config, readOnly: true }
  - { name: urls, mountPath: /etc/tidegate/urls, readOnly: true }
  {{- if include "tidegate.hasTls" . }}
  - { name: tls, mountPath: /etc/tidegate/tls, readOnly: true }
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* And the pods: who they run as, and where. */}}
{{- define "tidegate.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
