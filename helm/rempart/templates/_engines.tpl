{{/* Engines as they are meant: engineDefaults, below the machine's values, below the engine's own. */}}

{{/* All of them as JSON, by name; each also knows its name. */}}
{{- define "rempart.engines" -}}
{{- $engines := dict -}}
{{- range $name, $own := .Values.engines -}}
{{- $machine := get $.Values.machines ($own.machine | default $.Values.engineDefaults.machine) | default dict -}}
{{- $engine := mustMergeOverwrite (deepCopy $.Values.engineDefaults) (deepCopy $machine) (deepCopy $own) (dict "name" $name) -}}
{{- $_ := set $engines $name $engine -}}
{{- end -}}
{{- toJson $engines -}}
{{- end -}}

{{/* rempart.engineName (dict "root" $ "engine" $engine): of its workload, its Service and all else. */}}
{{- define "rempart.engineName" -}}
{{ include "rempart.fullname" .root }}-engine-{{ .engine.name }}
{{- end -}}

{{/* rempart.engineImage (dict "root" $ "engine" $engine) */}}
{{- define "rempart.engineImage" -}}
{{- $image := get .root.Values.images.engine .engine.image -}}
{{ include "rempart.image" (dict "root" .root "image" $image "suffix" (printf "-%s" .engine.image)) }}
{{- end -}}

{{/* One engine per model, for its tokenizer: the first by name. As JSON, by the model's name. */}}
{{- define "rempart.models" -}}
{{- $models := dict -}}
{{- range $name, $engine := include "rempart.engines" . | fromJson -}}
{{- if not (hasKey $models $engine.model.name) -}}
{{- $_ := set $models $engine.model.name $engine -}}
{{- end -}}
{{- end -}}
{{- toJson $models -}}
{{- end -}}

{{/* Seconds that an engine needs at most to load; verifying reads everything once more. */}}
{{- define "rempart.loadS" -}}
{{- $budget := .root.Values.startupBudget -}}
{{- $readings := ternary 2 1 .engine.weights.verify -}}
{{ add (ceil (divf (mulf .engine.weights.sizeGiB 1024 $readings) $budget.loadMiBPerS)) (int64 $budget.baseS) }}
{{- end -}}

{{/* Seconds that a new pod needs at most, from the order of a node to the first token. */}}
{{- define "rempart.startS" -}}
{{- $budget := .root.Values.startupBudget -}}
{{- $fetch := ternary (divf (mulf .engine.weights.sizeGiB 1024) $budget.fetchMiBPerS) 0.0 (ne .engine.weights.source "") -}}
{{ add (int64 $budget.nodeS) (ceil $fetch) (include "rempart.loadS" . | int64) }}
{{- end -}}

{{/* Seconds that the routers' rollout may take: the first ones are ready when an engine is. */}}
{{- define "rempart.routerRolloutS" -}}
{{- $slowest := 0 -}}
{{- range include "rempart.engines" . | fromJson -}}
{{- $slowest = max $slowest (include "rempart.startS" (dict "root" $ "engine" .) | int64) -}}
{{- end -}}
{{ add $slowest (include "rempart.grace" .Values.router.drain | int64) }}
{{- end -}}
