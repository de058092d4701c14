{{- define "latentguard.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "latentguard.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "latentguard.labels" -}}
{{ include "latentguard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* One line of TOML for each option; JSON's strings, numbers, switches and lists are TOML's. */ -}}
{{- define "latentguard.toml" -}}
{{- range $name, $value := .Values.options }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end -}}
