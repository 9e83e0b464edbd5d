{{/* The router's command line: what follows from other values, then its own flags. */}}
{{- define "rempart.routerArgs" -}}
- {{ printf "--host=%v" .Values.listenAddress | quote }}
- --http-port=8000
- --grpc-port=8001
- --metrics-port=8002
- {{ printf "--drain-timeout-s=%v" (int64 .Values.router.drain.timeoutS) | quote }}
- {{ printf "--hold-without-engine-s=%v" (int64 .Values.router.holdWithoutEngineS) | quote }}
{{- $service := printf "%s-engines" (include "rempart.fullname" .) }}
{{- if eq .Values.router.discovery "dns" }}
- {{ printf "--engines-dns=%v.%v.svc:50051" $service .Release.Namespace | quote }}
{{- else }}
- {{ printf "--engines-kubernetes=%v/%v:grpc" .Release.Namespace $service | quote }}
- {{ printf "--leader-lease=%v/%v-router" .Release.Namespace (include "rempart.fullname" .) | quote }}
{{- end }}
{{- range $model, $engine := include "rempart.models" . | fromJson }}
- {{ printf "--model=%v=%v" $model (include "rempart.modelPath" (dict "engine" $engine "under" (printf "/models/%s" $engine.name))) | quote }}
{{- with $engine.model.chatFormat }}
- {{ printf "--chat-format=%v=%v" $model . | quote }}
{{- end }}
{{- with index $engine.flags "max-model-len" }}
- {{ printf "--max-model-len=%v=%v" $model (int64 .) | quote }}
{{- end }}
{{- end }}
{{- range $name, $targets := .Values.router.aliases }}
- {{ printf "--alias=%v=%v" $name $targets | quote }}
{{- end }}
{{- if include "rempart.hasTenants" . }}
- --tenants-file=/etc/rempart/tenants.json
{{- end }}
{{- with .Values.router.batchStore }}
- {{ printf "--batch-store=%v" . | quote }}
{{- end }}
{{- with .Values.router.auditStore }}
- {{ printf "--audit-store=%v" . | quote }}
{{- end }}
{{- with .Values.router.auditRetentionDays }}
- {{ printf "--audit-retention-days=%v" (int64 .) | quote }}
{{- end }}
{{- with .Values.router.oidc }}
{{- if .issuer }}
- {{ printf "--oidc-issuer=%v" .issuer | quote }}
- {{ printf "--oidc-audience=%v" .audience | quote }}
{{- with .tenantClaim }}
- {{ printf "--oidc-tenant-claim=%v" . | quote }}
{{- end }}
{{- with .adminRole }}
- {{ printf "--oidc-admin-role=%v" . | quote }}
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
