{{- define "rempart.gatewayRef" -}}
{{- if .Values.gateway.className -}}
- name: {{ include "rempart.fullname" . }}
{{- else -}}
- name: {{ .Values.gateway.parent.name }}
  {{- with .Values.gateway.parent.namespace }}
  namespace: {{ . }}
  {{- end }}
  {{- with .Values.gateway.parent.sectionName }}
  sectionName: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What the world may call by HTTP; health is for the cluster. */}}
{{- define "rempart.publicPaths" -}}
/v1 /tokenize
{{- end -}}

{{/* What the world may call by gRPC. Admin is not among it: reach it inside the cluster. */}}
{{- define "rempart.publicServices" -}}
rempart.v1.Inference rempart.v1.Batches grpc.health.v1.Health
{{- end -}}
