{{/* Command lines. */}}

{{/* rempart.flags (dict "flags" map): --name=value; true is --name, false --no-name. */}}
{{- define "rempart.flags" -}}
{{- range $name, $value := .flags }}
{{- if kindIs "bool" $value }}
- {{ ternary (printf "--%s" $name) (printf "--no-%s" $name) $value | quote }}
{{- else if kindIs "string" $value }}
- {{ printf "--%s=%s" $name $value | quote }}
{{- else }}
- {{ printf "--%s=%s" $name (toJson $value) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Flags that follow from other values, so nobody may give them again. */}}
{{- define "rempart.routerFlagsOfTheChart" -}}
alias audit-retention-days audit-store batch-store chat-format drain-delay-s drain-timeout-s engines engines-dns engines-kubernetes grpc-port hold-without-engine-s host http-port leader-lease max-model-len metrics-port model oidc-admin-role oidc-audience oidc-issuer oidc-tenant-claim tenants-file
{{- end -}}

{{- define "rempart.engineFlagsOfTheChart" -}}
device drain-timeout-s host manifest-key metrics-port model port require-manifest served-model-name
{{- end -}}
