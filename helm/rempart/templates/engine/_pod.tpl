{{/* The pod of an engine, `leads` when routers talk to it: rempart.enginePod (dict "root" $ "engine" $engine "leads" true "revisions" true) */}}
{{- define "rempart.enginePod" -}}
{{- $root := .root -}}
{{- $engine := .engine -}}
{{- $weights := $engine.weights -}}
{{- $image := include "rempart.engineImage" . -}}
metadata:
  labels:
    {{- include "rempart.selector" (dict "root" $root "component" "engine" "engine" $engine.name) | nindent 4 }}
    rempart/role: {{ $engine.role }}
    {{- if .leads }}
    rempart/leader: "true"
    {{- end }}
  annotations:
    rempart/model: {{ $engine.model.name | quote }}
    rempart/parallel: {{ $engine.parallel | toJson | quote }}
    {{- with $engine.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "rempart.fullname" $root }}-engine
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "rempart.grace" $engine.drain }}
  {{- with $engine.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with include "rempart.priority" (dict "root" $root "component" "engine") | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "rempart.pulling" $root | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "rempart.podSecurity" (dict) | nindent 4 }}
  {{- include "rempart.spread" (dict "root" $root "component" "engine" "engine" $engine.name "revisions" .revisions) | nindent 2 }}
  {{- with $engine.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $engine.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $weights.source }}
  initContainers:
    {{- include "rempart.fetch" (dict "root" $root "engine" $engine "name" "fetch" "image" $image "volume" "weights" "under" "/weights") | nindent 4 }}
  {{- end }}
  containers:
    - name: engine
      image: {{ $image }}
      imagePullPolicy: {{ $root.Values.images.pullPolicy }}
      command: [python, -m, rempart_engine]
      args:
        - {{ printf "--model=%v" (include "rempart.modelPath" (dict "engine" $engine "under" "/weights")) | quote }}
        - {{ printf "--served-model-name=%v" $engine.model.name | quote }}
        - {{ printf "--device=%v" $engine.image | quote }}
        - {{ printf "--host=%v" $root.Values.listenAddress | quote }}
        - --port=50051
        - --metrics-port=50052
        - {{ printf "--drain-timeout-s=%v" (int64 $engine.drain.timeoutS) | quote }}
        {{- if not (hasKey $engine.flags "num-threads") }}
        - --num-threads=$(ENGINE_CPUS)
        {{- end }}
        {{- if $weights.verify }}
        - {{ printf "--require-manifest=%v/manifest.json" (include "rempart.modelFolder" (dict "engine" $engine "under" "/weights")) | quote }}
        {{- if $weights.publicKey }}
        - {{ printf "--manifest-key=/keys/%v.pem" $engine.name | quote }}
        {{- end }}
        {{- end }}
        {{- with include "rempart.flags" (dict "flags" $engine.flags) | trim }}
        {{- . | nindent 8 }}
        {{- end }}
      env:
        # Cores of the limit, not of the node.
        - name: ENGINE_CPUS
          valueFrom:
            resourceFieldRef: {resource: limits.cpu}
        # All that libraries write lies in the one place that may be written.
        {{- range $name, $folder := dict "HOME" "/tmp" "NUMBA_CACHE_DIR" "/tmp/numba" "TRITON_CACHE_DIR" "/tmp/triton" "XDG_CACHE_HOME" "/tmp/cache" }}
        - name: {{ $name }}
          value: {{ $folder }}
        {{- end }}
      ports:
        - {name: grpc, containerPort: 50051}
        - {name: metrics, containerPort: 50052}
      # Started: the model is loaded. Alive: the event loop answers. Ready: it takes requests.
      startupProbe:
        grpc: {port: 50051, service: rempart.v1.Engine}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ ceil (divf (include "rempart.loadS" (dict "root" $root "engine" $engine)) 10) | int64 }}
      livenessProbe:
        grpc: {port: 50051}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        grpc: {port: 50051, service: rempart.v1.Engine}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      lifecycle:
        {{- include "rempart.preStop" (dict "root" $root "seconds" $engine.drain.preStopS) | nindent 8 }}
      resources:
        {{- toYaml $engine.resources | nindent 8 }}
      securityContext:
        {{- include "rempart.containerSecurity" (dict "writableRoot" (not $engine.readOnlyRootFilesystem)) | nindent 8 }}
      volumeMounts:
        - {name: weights, mountPath: /weights, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if $weights.publicKey }}
        - {name: keys, mountPath: /keys, readOnly: true}
        {{- end }}
  volumes:
    {{- include "rempart.weightsVolume" (dict "root" $root "engine" $engine "name" "weights" "readOnly" (not $weights.source)) | nindent 4 }}
    - name: tmp
      emptyDir: {sizeLimit: 4Gi}
    {{- if $weights.source }}
    {{- with include "rempart.trustVolume" $root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- end }}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ $engine.sharedMemory }}}
    {{- if $weights.publicKey }}
    {{- include "rempart.keysVolume" $root | nindent 4 }}
    {{- end }}
{{- end -}}
