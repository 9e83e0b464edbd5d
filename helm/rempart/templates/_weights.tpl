{{/*
Weights on their way into a pod:

  source ──(init container `fetch`)──► volume `weights` at /weights ──(read-only)──► the engine
  claim, image, filled nodeCache ─────► the same volume, nothing fetched

Routers need the tokenizer only: fetched into an emptyDir at /models/ENGINE, or the same volume read-only.
*/}}

{{/* rempart.modelFolder (dict "engine" $engine "under" "/weights"): where fetching puts it. */}}
{{- define "rempart.modelFolder" -}}
{{- $weights := .engine.weights -}}
{{- $own := or (ne $weights.source "") (eq $weights.from "nodeCache") -}}
{{- join "/" (compact (list .under ($weights.directory | default (ternary .engine.name "" $own)))) -}}
{{- end -}}

{{/* rempart.modelPath: with the file, if it is one. */}}
{{- define "rempart.modelPath" -}}
{{- join "/" (compact (list (include "rempart.modelFolder" .) .engine.weights.file)) -}}
{{- end -}}

{{/* rempart.claimName (dict "root" $ "engine" $engine) */}}
{{- define "rempart.claimName" -}}
{{ .engine.weights.claim.name | default (printf "%s-weights" (include "rempart.engineName" .)) }}
{{- end -}}

{{/* rempart.weightsVolume (dict "root" $ "engine" $engine "name" "weights" "readOnly" true) */}}
{{- define "rempart.weightsVolume" -}}
{{- $weights := .engine.weights -}}
- name: {{ .name }}
  {{- if eq $weights.from "emptyDir" }}
  emptyDir:
    sizeLimit: {{ ceil (mulf $weights.sizeGiB 1.1) | int64 | add1 }}Gi
  {{- else if eq $weights.from "nodeCache" }}
  hostPath:
    path: {{ $weights.hostPath }}
    type: Directory
  {{- else if eq $weights.from "claim" }}
  persistentVolumeClaim:
    claimName: {{ include "rempart.claimName" . }}
    readOnly: {{ .readOnly }}
  {{- else }}
  image:
    reference: {{ $weights.image }}
    pullPolicy: {{ .root.Values.images.pullPolicy }}
  {{- end }}
{{- end -}}

{{/*
The init container that fetches; each file is hashed as it comes. Without the weights, what is left is the tokenizer:
rempart.fetch (dict "root" $ "engine" $engine "name" "fetch" "image" $image "volume" "weights" "under" "/weights" "exclude" (list))
*/}}
{{- define "rempart.fetch" -}}
{{- $weights := .engine.weights -}}
- name: {{ .name }}
  image: {{ .image }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  command: [python, -m, rempart_engine.fetch]
  args:
    - {{ $weights.source | quote }}
    - {{ include "rempart.modelFolder" . | quote }}
    {{- if $weights.publicKey }}
    - --public-key=/keys/{{ .engine.name }}.pem
    {{- end }}
    {{- range .exclude }}
    - {{ printf "--exclude=%s" . | quote }}
    {{- end }}
  env:
    - name: HOME
      value: /tmp
    {{- with include "rempart.trustEnv" .root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "rempart.objectStorageEnv" (dict "root" .root "secret" (include "rempart.objectStorageSecretName" .root)) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: 500m, memory: 512Mi}
    limits: {cpu: "2", memory: 1Gi}
  securityContext:
    {{- include "rempart.containerSecurity" (dict) | nindent 4 }}
  volumeMounts:
    - {name: {{ .volume }}, mountPath: /{{ .volume }}}
    - {name: tmp, mountPath: /tmp}
    {{- with include "rempart.trustMount" .root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- if $weights.publicKey }}
    - {name: keys, mountPath: /keys, readOnly: true}
    {{- end }}
{{- end -}}

{{/* Public keys that sign manifests. */}}
{{- define "rempart.keysVolume" -}}
- name: keys
  configMap:
    name: {{ include "rempart.fullname" . }}-keys
    defaultMode: 0444
{{- end -}}

{{/* Whether any engine has one; "yes" or nothing. */}}
{{- define "rempart.hasKeys" -}}
{{- range include "rempart.engines" . | fromJson -}}
{{- if .weights.publicKey -}}yes{{- end -}}
{{- end -}}
{{- end -}}
