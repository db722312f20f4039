#!/usr/bin/env bash
# Start a ranking run as a workload of a GKE cluster, from the last commit on a Python image, or from your image. It waits in
# the cluster's queue until the slice is free. After a preemption it starts again and resumes from its journal, so --output
# must be in /shared. Costs nothing beyond the cluster, and the image's storage.
#   tpu_scripts/gke_launch.sh --project P --zone Z --cluster C --accelerator-type v5litepod-16 --workload qwen \
#       --config qwen2_vl_7b -- --output /shared/runs/qwen2_vl_7b

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone cluster accelerator-type workload config)
takes=(docker-image base-docker-image max-restarts)
rest="fields of rlens_jax.rank, such as --output FOLDER (python -m rlens_jax.rank --help)"
parse_options "$@"
[[ ${opt[workload]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "--workload must be up to 40 lower-case letters, digits and '-', not '${opt[workload]}'"

config=${opt[config]} dist=${here%/*}/dist
command="exec python -m rlens_jax.rank"  # exec, so that the signal of a preemption reaches it
if [[ -n ${opt[docker-image]} ]]; then
    image=(--docker-image="${opt[docker-image]}")  # the configuration is one of that image
else
    check_config "$config"
    image=(--base-docker-image="${opt[base-docker-image]}" --script-dir="$dist/source")
    command="pip install --quiet '.[tpu,gcs]' && $command"
    pack_source
    run rm -rf "$dist/source"
    run tar -xzf "$dist/rlens_jax.tar.gz" -C "$dist"
    if [[ -f $config ]]; then
        run cp "$config" "$dist/source/workload.yaml"
        config=./workload.yaml
    fi
fi
# 75: a process of the run was lost, and the others ended with it; XPK adds those of signals itself
cluster workload create --workload="${opt[workload]}" --tpu-type="${opt[accelerator-type]}" --num-slices=1 "${image[@]}" \
    --max-restarts="${opt[max-restarts]}" --restart-on-exit-codes=75 \
    --command="$command $(quoted --config "$config" "${arguments[@]}")"
