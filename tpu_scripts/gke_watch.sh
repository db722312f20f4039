#!/usr/bin/env bash
# Follow the log of a workload's first worker, then wait until the workload ends. Costs and changes nothing, except that kubectl
# is pointed at the cluster. Ends with exit code 0 if the workload succeeded, else 1.
#   tpu_scripts/gke_watch.sh --project P --zone Z --cluster C --workload qwen

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone cluster workload)
takes=(lines)
parse_options "$@"

run gcloud container clusters get-credentials "${opt[cluster]}" --location="${opt[zone]%-*}" --project="${opt[project]}"
worker=xpk.google.com/workload=${opt[workload]},batch.kubernetes.io/job-completion-index=0
run kubectl logs --selector="$worker" --follow --tail="${opt[lines]}" ||
    note "the log is not available yet; waiting for the end (run this again to see it)"
cluster workload list --wait-for-job-completion="${opt[workload]}" || fail "${opt[workload]} did not succeed"
