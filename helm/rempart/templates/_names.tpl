{{/* Names and labels. Every helper that needs more than the root takes a dict with `root`. */}}

{{- define "rempart.fullname" -}}
{{- $own := ternary .Release.Name (printf "%s-rempart" .Release.Name) (contains "rempart" .Release.Name) -}}
{{ .Values.fullnameOverride | default $own }}
{{- end -}}

{{/* rempart.labels (dict "root" $ "component" "router"): labels of an object. Pods have the selector's alone: a new chart must not restart an engine that it does not change. */}}
{{- define "rempart.labels" -}}
{{ include "rempart.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{/* rempart.selector (dict "root" $ "component" "engine" "engine" $name) */}}
{{- define "rempart.selector" -}}
app.kubernetes.io/name: rempart
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .engine }}
rempart/engine: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* rempart.image (dict "root" $ "image" .Values.images.router "suffix" "") */}}
{{- define "rempart.image" -}}
{{- $registry := .image.registry | default .root.Values.images.registry -}}
{{- $place := printf "%s/%s" $registry .image.repository -}}
{{- if .image.digest -}}
{{ $place }}@{{ .image.digest }}
{{- else -}}
{{ $place }}:{{ .image.tag | default (printf "%s%s" .root.Chart.AppVersion (.suffix | default "")) }}
{{- end -}}
{{- end -}}

{{- define "rempart.secretName" -}}
{{ .Values.secrets.existingSecret | default (include "rempart.fullname" .) }}
{{- end -}}

{{- define "rempart.redisSecretName" -}}
{{- if and (eq .Values.redis.mode "external") (not .Values.externalSecrets.redisKey) -}}
{{ .Values.redis.existingSecret }}
{{- else -}}
{{ include "rempart.fullname" . }}-redis
{{- end -}}
{{- end -}}

{{- define "rempart.objectStorageSecretName" -}}
{{- if .Values.externalSecrets.objectStorageKey -}}
{{ include "rempart.fullname" . }}-object-storage
{{- else -}}
{{ .Values.objectStorage.credentialsSecret }}
{{- end -}}
{{- end -}}

{{/* Secrets that pods name and this chart does not bring, between spaces. */}}
{{- define "rempart.secretsOfOthers" -}}
{{- $names := concat (.Values.images.pullSecrets | default list) (values (.Values.router.secretFiles | default dict)) -}}
{{- $names = append $names .Values.secrets.existingSecret -}}
{{- $external := .Values.externalSecrets -}}
{{- if and (eq .Values.redis.mode "external") (not $external.redisKey) -}}
{{- $names = append $names .Values.redis.existingSecret -}}
{{- end -}}
{{- $storage := ternary "" .Values.objectStorage.credentialsSecret (ne $external.objectStorageKey "") -}}
{{- range include "rempart.engines" . | fromJson -}}
{{- $names = append $names (ternary $storage "" (ne .weights.source "")) -}}
{{- end -}}
{{- if or .Values.router.batchStore .Values.router.auditStore -}}
{{- $names = append $names (.Values.objectStorage.routerCredentialsSecret | default $storage) -}}
{{- end -}}
{{ $names | compact | uniq | sortAlpha | join " " }}
{{- end -}}
