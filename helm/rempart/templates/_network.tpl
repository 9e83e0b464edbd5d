{{/* Rules that several NetworkPolicies have. */}}

{{/* rempart.allowTo (dict "to" peers "ports" ports): egress by TCP. */}}
{{- define "rempart.allowTo" -}}
- to:
    {{- toYaml .to | nindent 4 }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ int64 . }}}
    {{- end }}
{{- end -}}

{{- define "rempart.allowDns" -}}
- to:
    {{- toYaml .Values.networkPolicy.dns.to | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.dns.ports }}
    - {protocol: UDP, port: {{ int64 . }}}
    - {protocol: TCP, port: {{ int64 . }}}
    {{- end }}
{{- end -}}

{{/* rempart.allowMonitoring (dict "root" $ "port" 8002) */}}
{{- define "rempart.allowMonitoring" -}}
- from:
    {{- toYaml .root.Values.networkPolicy.monitoring | nindent 4 }}
  ports:
    - {protocol: TCP, port: {{ .port }}}
{{- end -}}
