{{- define "rempart.scaleTarget" -}}
{{- if gt (int64 .engine.nodes) 1 -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "rempart.engineName" . }}
{{- end -}}

{{/* Up at once, at most doubling every 15 s; down one by one, after a quiet while. */}}
{{- define "rempart.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  selectPolicy: Max
  policies:
    - {type: Percent, value: 100, periodSeconds: 15}
    - {type: Pods, value: 1, periodSeconds: 15}
scaleDown:
  stabilizationWindowSeconds: {{ int64 .scaleDownAfterS }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end -}}
