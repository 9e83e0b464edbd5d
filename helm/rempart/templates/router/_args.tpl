{{/* The router's command line: what follows from other values, then its own flags. */}}
{{- define "rempart.routerArgs" -}}
{{- $root := . -}}
{{- $services := list -}}
{{- range $name, $engine := include "rempart.engines" . | fromJson -}}
{{- $service := include "rempart.engineName" (dict "root" $root "engine" $engine) -}}
{{- if eq $root.Values.router.discovery "kubernetes" -}}
{{- $services = append $services (printf "%s/%s:grpc" $root.Release.Namespace $service) -}}
{{- else -}}
{{- $services = append $services (printf "%s.%s.svc:50051" $service $root.Release.Namespace) -}}
{{- end -}}
{{- end -}}
- --host={{ .Values.listenAddress }}
- --http-port=8000
- --grpc-port=8001
- --metrics-port=8002
- --drain-timeout-s={{ int64 .Values.router.drain.timeoutS }}
- --hold-without-engine-s={{ int64 .Values.router.holdWithoutEngineS }}
- --engines-{{ .Values.router.discovery }}={{ join "," $services }}
{{- if eq .Values.router.discovery "kubernetes" }}
- --leader-lease={{ .Release.Namespace }}/{{ include "rempart.fullname" . }}-router
{{- end }}
{{- range $model, $engine := include "rempart.models" . | fromJson }}
- --model={{ $model }}={{ include "rempart.modelPath" (dict "engine" $engine "under" (printf "/models/%s" $engine.name)) }}
{{- with $engine.model.chatFormat }}
- --chat-format={{ $model }}={{ . }}
{{- end }}
{{- end }}
{{- range $name, $targets := .Values.router.aliases }}
- --alias={{ $name }}={{ $targets }}
{{- end }}
{{- if include "rempart.hasTenants" . }}
- --tenants-file=/etc/rempart/tenants.json
{{- end }}
{{- with .Values.router.batchStore }}
- --batch-store={{ . }}
{{- end }}
{{- with .Values.router.auditStore }}
- --audit-store={{ . }}
{{- end }}
{{- with .Values.router.oidc }}
{{- if .issuer }}
- --oidc-issuer={{ .issuer }}
- --oidc-audience={{ .audience }}
{{- with .tenantClaim }}
- --oidc-tenant-claim={{ . }}
{{- end }}
{{- with .adminRole }}
- --oidc-admin-role={{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- with include "rempart.flags" (dict "flags" .Values.router.flags) | trim }}
{{ . }}
{{- end }}
{{- end -}}

{{- define "rempart.hasTenants" -}}
{{- if or .Values.tenants.plans .Values.tenants.tenants .Values.tenants.prices -}}yes{{- end -}}
{{- end -}}

{{/* Whether routers reach object storage. */}}
{{- define "rempart.routerUsesStorage" -}}
{{- $uses := or .Values.router.batchStore .Values.router.auditStore -}}
{{- range include "rempart.models" . | fromJson -}}
{{- $uses = or $uses .weights.source -}}
{{- end -}}
{{- if $uses -}}yes{{- end -}}
{{- end -}}

{{- define "rempart.routerSelector" -}}
{{- include "rempart.selector" (dict "root" . "component" "router") -}}
{{- end -}}

{{- define "rempart.routerLabels" -}}
{{- include "rempart.labels" (dict "root" . "component" "router") -}}
{{- end -}}
