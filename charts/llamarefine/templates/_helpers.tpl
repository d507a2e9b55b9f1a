{{/* The labels of every object. Arguments: `component`, `root`. */}}
{{- define "llamarefine.labels" -}}
{{ include "llamarefine.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* The labels that select a pod. None of them may change with a release, because a Job's and a Deployment's selector are immutable. */}}
{{- define "llamarefine.selector" -}}
app.kubernetes.io/name: llamarefine
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The launcher's settings in this release, with every key that the chart decides. */}}
{{- define "llamarefine.settings" -}}
{{- $settings := deepCopy .Values.settings }}
{{- if .Values.minio.enabled }}
{{- $_ := set $settings "store" ($settings.store | default (printf "s3://%s" .Values.minio.bucket)) }}
{{- $_ := set $settings "s3_endpoint" ($settings.s3_endpoint | default "http://llamarefine-minio:9000") }}
{{- end }}
{{- if not $settings.store }}
{{- fail "settings.store is empty: name a bucket, as in s3://bucket/prefix, or set minio.enabled for one in the namespace" }}
{{- end }}
{{- $_ := set $settings "namespace" .Release.Namespace }}
{{- $_ := set $settings "image_tag" ($settings.image_tag | default .Chart.AppVersion) }}
{{- range list "secret_name" "s3_endpoint" "stage_service_account" "gpu_resource" "shared_memory" "deadline_s" }}
{{- /* helm drops a key whose value is null, and the launcher would then use its default; so null is set again */}}
{{- if not (get $settings .) }}{{ $_ := set $settings . nil }}{{ end }}
{{- end }}
{{- toYaml $settings }}
{{- end }}

{{/* The full name of one of our images. Arguments: `name`, `root`. */}}
{{- define "llamarefine.image" -}}
{{- $settings := include "llamarefine.settings" .root | fromYaml }}
{{- with $settings.image_registry }}{{ trimSuffix "/" . }}/{{ end }}llamarefine-{{ .name }}:{{ $settings.image_tag }}
{{- end }}

{{/* The recipe's text, or nothing if no recipe is given. */}}
{{- define "llamarefine.recipe" -}}
{{- if kindIs "string" .Values.recipe }}
{{- $read := .Values.recipe | fromYaml }}
{{- with get $read "Error" }}{{ fail (printf "recipe: cannot be read as YAML: %s" .) }}{{ end }}
{{- .Values.recipe }}
{{- else if .Values.recipe }}
{{- toYaml .Values.recipe }}
{{- end }}
{{- end }}

{{/* A restricted pod of the launcher's image with settings and credentials. Arguments: `root`, `args`, `maps` (ConfigMaps to mount). */}}
{{- define "llamarefine.pod" -}}
{{- $settings := include "llamarefine.settings" .root | fromYaml }}
restartPolicy: Never
serviceAccountName: {{ $settings.service_account }}
enableServiceLinks: false
{{- with $settings.image_pull_secrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $settings.priority_class }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.launcher.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.launcher.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- include "llamarefine.podSecurity" . | nindent 2 }}
containers:
  - name: launcher
    image: {{ include "llamarefine.image" (dict "root" .root "name" "launcher") }}
    imagePullPolicy: {{ $settings.image_pull_policy }}
    {{- with .args }}
    args: {{- toYaml . | nindent 6 }}
    {{- end }}
    workingDir: /etc/llamarefine  # where llamarefine.yaml is
    env:
      - {name: HOME, value: /scratch}
      - {name: TMPDIR, value: /scratch}
      - {name: AWS_REGION, value: {{ $settings.s3_region | quote }}}
      {{- with $settings.s3_endpoint }}
      - {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
      {{- end }}
      {{- if $settings.secret_name }}
      {{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
      - {name: {{ . }}, valueFrom: {secretKeyRef: {name: {{ $settings.secret_name }}, key: {{ . }}}}}
      {{- end }}
      {{- end }}
      {{- with .root.Values.launcher.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources: {{- toYaml .root.Values.launcher.resources | nindent 6 }}
    securityContext: {{- include "llamarefine.containerSecurity" . | nindent 6 }}
    terminationMessagePolicy: FallbackToLogsOnError
    volumeMounts:
      - {name: config, mountPath: /etc/llamarefine, readOnly: true}
      - {name: scratch, mountPath: /scratch}
      {{- with .root.Values.launcher.volumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    projected:
      sources:
        {{- range .maps }}
        - configMap: {name: {{ . }}}
        {{- end }}
  - {name: scratch, emptyDir: {}}
  {{- with .root.Values.launcher.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "llamarefine.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "llamarefine.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}

{{/* The TCP port of settings.s3_endpoint; 443 for Amazon. */}}
{{- define "llamarefine.bucketPort" -}}
{{- $endpoint := (include "llamarefine.settings" . | fromYaml).s3_endpoint | default "https://" }}
{{- regexFind ":[0-9]+/?$" $endpoint | trimPrefix ":" | trimSuffix "/" | default (hasPrefix "http://" $endpoint | ternary "80" "443") }}
{{- end }}

{{/* The API permissions that driving a run needs; tests/chart/test_role.py compares them with the launcher's code. */}}
{{- define "llamarefine.rules" -}}
- {apiGroups: [batch], resources: [jobs], verbs: [create, get, list, watch, delete]}
- {apiGroups: [""], resources: [configmaps], verbs: [create, get, list, patch, delete]}
- {apiGroups: [""], resources: [services], verbs: [create, get, list, patch, delete]}
- {apiGroups: [""], resources: [pods], verbs: [get, list, watch, delete]}
- {apiGroups: [""], resources: [pods/status], verbs: [patch]}
- {apiGroups: [""], resources: [pods/log], verbs: [get]}
- {apiGroups: [""], resources: [events], verbs: [list]}
- {apiGroups: [""], resources: [serviceaccounts], verbs: [get]}
{{- end }}
