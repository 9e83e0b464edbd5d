{{/* Rules that several NetworkPolicies have. None for an empty list of peers, which Kubernetes would take for everybody. */}}

{{/* rempart.allowTo (dict "to" peers "ports" ports): egress by TCP. */}}
{{- define "rempart.allowTo" -}}
{{- if .to -}}
- to:
    {{- toYaml .to | nindent 4 }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ int64 . }}}
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "rempart.allowDns" -}}
{{- with .Values.networkPolicy.dns.to -}}
- to:
    {{- toYaml . | nindent 4 }}
  ports:
    {{- range $.Values.networkPolicy.dns.ports }}
    - {protocol: UDP, port: {{ int64 . }}}
    - {protocol: TCP, port: {{ int64 . }}}
    {{- end }}
{{- end -}}
{{- end -}}

{{/* rempart.allowMonitoring (dict "root" $ "port" 8002) */}}
{{- define "rempart.allowMonitoring" -}}
{{- with .root.Values.networkPolicy.monitoring -}}
- from:
    {{- toYaml . | nindent 4 }}
  ports:
    - {protocol: TCP, port: {{ $.port }}}
{{- end -}}
{{- end -}}
