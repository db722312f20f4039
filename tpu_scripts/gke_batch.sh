#!/usr/bin/env bash
# Run several configurations in turn as workloads of one GKE cluster; each writes to OUTPUT/NAME. A failed configuration does
# not stop the rest. Ends with a summary, and with exit code 1 if any failed. Costs nothing beyond the cluster, which costs
# money until gke_delete.sh --whole-cluster.
#   tpu_scripts/gke_batch.sh --project P --zone Z --cluster C --accelerator-type v5litepod-16 --output /shared/runs \
#       -- qwen2_vl_7b mine.yaml

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=tpu_scripts/lib/batch.sh
source "$here/lib/batch.sh"
needs=(project zone cluster accelerator-type output)
takes=(docker-image base-docker-image max-restarts)
rest="CONFIG ..., presets or YAML files"
parse_options "$@"
name_runs
pass_options

workload() { local name=${names[$1],,}; echo "${name//[^a-z0-9]/-}"; }  # as Kubernetes spells names

for index in "${!arguments[@]}"; do
    RLENS_CONFIG=${arguments[index]} RLENS_WORKLOAD=$(workload "$index") \
        "$here/gke_launch.sh" -- --output "${opt[output]}/${names[index]}" && code=0 || code=$?
    codes+=("$code")
done
for index in "${!arguments[@]}"; do
    ((codes[index] == 0)) || continue
    RLENS_WORKLOAD=$(workload "$index") "$here/gke_watch.sh" || codes[index]=$?
done
summarize
