{{- define "rempart.redisName" -}}
{{ include "rempart.fullname" . }}-redis
{{- end -}}

{{- define "rempart.redisLabels" -}}
{{- include "rempart.labels" (dict "root" . "component" "redis") -}}
{{- end -}}

{{- define "rempart.redisSelector" -}}
{{- include "rempart.selector" (dict "root" . "component" "redis") -}}
{{- end -}}
