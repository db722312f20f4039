#!/usr/bin/env bash
# Delete a workload, or with --whole-cluster the cluster; only the latter ends the cost. The bucket and its contents stay.
# XPK asks for confirmation, unless --yes.
#   tpu_scripts/gke_delete.sh --project P --zone Z --cluster C --workload qwen
#   tpu_scripts/gke_delete.sh --project P --zone Z --cluster C --whole-cluster

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone cluster)
takes=(workload)
switches=(whole-cluster yes)
parse_options "$@"

if [[ -n ${opt[whole-cluster]} ]]; then
    cluster cluster delete ${opt[yes]:+--force}
else
    require workload
    cluster workload delete --workload="${opt[workload]}" ${opt[yes]:+--force}
fi
