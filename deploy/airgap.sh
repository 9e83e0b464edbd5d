#!/bin/sh
# Bring Rempart to a cluster without the Internet.
#
#     deploy/airgap.sh list FLAGS...              what an installation with these values needs
#     deploy/airgap.sh pack FOLDER FLAGS...       put it into a folder: images, chart, models, checksums
#     deploy/airgap.sh push FOLDER REGISTRY       inside: check the folder, push its images, say how to install
#
# FLAGS are those of `helm install`: -f deploy/providers/scaleway.yaml -f my-values.yaml --set ...
# Needs helm; packing and pushing need skopeo, and packing models `rempart` with the access of their storage
# (AWS_ACCESS_KEY_ID and so on). Inside, models go to the object storage with any S3 client: s3://BUCKET/PREFIX lies in
# models/BUCKET/PREFIX.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
chart=$here/../helm/rempart

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

needs() { # "image REFERENCE" and "model URL", each once
  rendered=$(helm template rempart "$chart" "$@") || exit 1
  printf '%s\n' "$rendered" | sed -n \
    -e 's/^ *-\{0,1\} *\(image\|reference\): *"\{0,1\}\([^" ]*\)"\{0,1\} *$/image \2/p' \
    -e 's/^ *- *"\{0,1\}\(s3:\/\/[^" ]*\)"\{0,1\} *$/model \1/p' | sort -u
}

name_of() { # as it lies below any `images.registry`: rempart-router:0.1.0, valkey/valkey:8.1.1
  case $1 in
    */rempart-router[:@]*|*/rempart-engine[:@]*) basename "$1" ;;
    *.*/*|*:*/*|localhost/*) echo "${1#*/}" ;;
    *) echo "$1" ;;
  esac
}

file_of() { name_of "$1" | tr '/:@' '---'; }

pack() {
  folder=$1; shift
  mkdir -p "$folder/images" "$folder/models"
  list=$(needs "$@")
  helm package "$chart" --destination "$folder" >/dev/null
  echo "$list" | while read -r kind what; do
    echo "$kind $what" >&2
    case $kind in
      image)
        image=$folder/images/$(file_of "$what")
        skopeo copy --all --preserve-digests --quiet "docker://$what" "dir:$image"
        echo "$what" >"$image.reference"
        ;;
      model)
        model=${what#s3://} model=$folder/models/${model%/}
        rempart fetch "$what" "$model"
        rm -f "$model.lock"
        ;;
    esac
  done
  (cd "$folder" && find . -type f ! -name SHA256SUMS -exec sha256sum {} + | sort -k 2 >SHA256SUMS)
}

push() {
  folder=$1 registry=$2
  (cd "$folder" && sha256sum --check --quiet SHA256SUMS)
  for reference in "$folder"/images/*.reference; do
    name=$registry/$(name_of "$(cat "$reference")")
    skopeo copy --all --preserve-digests --quiet "dir:${reference%.reference}" "docker://$name"
    echo "pushed $name" >&2
  done
  echo "helm install rempart $(ls "$folder"/rempart-*.tgz) -f VALUES --set images.registry=$registry --set images.redis.registry=$registry"
}

[ $# -ge 1 ] || usage
action=$1; shift
case $action in
  list) needs "$@" ;;
  pack) [ $# -ge 1 ] || usage; pack "$@" ;;
  push) [ $# -eq 2 ] || usage; push "$@" ;;
  *) usage ;;
esac
