{{/* What all pods have in common: restricted pod security, spread, priority, pulling. */}}

{{- define "rempart.podSecurity" -}}
{{- $user := .user | default 10001 -}}
runAsNonRoot: true
runAsUser: {{ $user }}
runAsGroup: {{ $user }}
fsGroup: {{ $user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* rempart.containerSecurity (dict "writableRoot" false) */}}
{{- define "rempart.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: {{ not .writableRoot }}
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "rempart.pulling" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* rempart.priority (dict "root" $ "component" "router") */}}
{{- define "rempart.priorityClassName" -}}
{{- $existing := get .root.Values.priorityClasses.existing .component -}}
{{- if $existing -}}
{{ $existing }}
{{- else if .root.Values.priorityClasses.create -}}
{{ .root.Release.Namespace }}-{{ include "rempart.fullname" .root }}-{{ .component }}
{{- end -}}
{{- end -}}

{{- define "rempart.priority" -}}
{{- with include "rempart.priorityClassName" . }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* rempart.spread (dict "root" $ "component" "engine" "engine" $name "revisions" true): `revisions` counts each of a Deployment's apart. */}}
{{- define "rempart.spread" -}}
{{- $context := . -}}
topologySpreadConstraints:
{{- range $key, $when := dict "topology.kubernetes.io/zone" .root.Values.topologySpread.zone "kubernetes.io/hostname" .root.Values.topologySpread.node }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: {{ $when }}
    labelSelector:
      matchLabels:
        {{- include "rempart.selector" $context | nindent 8 }}
    {{- if $context.revisions }}
    matchLabelKeys: [pod-template-hash]
    {{- end }}
{{- end }}
{{- end -}}

{{/* rempart.preStop (dict "root" $ "seconds" 15): Kubernetes sleeps itself since 1.30. */}}
{{- define "rempart.preStop" -}}
preStop:
  {{- if semverCompare ">=1.30.0-0" .root.Capabilities.KubeVersion.Version }}
  sleep:
    seconds: {{ int64 .seconds }}
  {{- else }}
  exec:
    command: [sleep, {{ int64 .seconds | quote }}]
  {{- end }}
{{- end -}}

{{/* Seconds beside preStop and drain: sessions end, ledger and queue settle, the process exits. */}}
{{- define "rempart.grace" -}}
{{ add (int64 .preStopS) (int64 .timeoutS) 15 }}
{{- end -}}

{{/* Where object storage is, and who asks: rempart.objectStorageEnv (dict "root" $ "secret" $name) */}}
{{- define "rempart.objectStorageEnv" -}}
{{- with .root.Values.objectStorage.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .root.Values.objectStorage.region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- with $secret := .secret }}
{{- range $name := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $name }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What Python and obstore look for instead of the image's certificates; then its volume and where that is. Of the root. */}}
{{- define "rempart.trustEnv" -}}
{{- if .Values.trustedCertificates }}
- name: SSL_CERT_FILE
  value: /run/trusted/ca.crt
{{- end }}
{{- end -}}

{{- define "rempart.trustMount" -}}
{{- if .Values.trustedCertificates }}
- {name: trusted, mountPath: /run/trusted, readOnly: true}
{{- end }}
{{- end -}}

{{- define "rempart.trustVolume" -}}
{{- with .Values.trustedCertificates }}
- name: trusted
  configMap:
    name: {{ . }}
    defaultMode: 0444
{{- end }}
{{- end -}}
