#!/usr/bin/env bash
# Copy the results of a run to this machine: from a bucket, or from the disk of a slice's first worker (then with the log).
# Reading from a bucket costs its egress; nothing is changed there. Run this before delete.sh.
#   tpu_scripts/fetch.sh --project P --output gs://BUCKET/runs/qwen2_vl_7b --to runs/qwen2_vl_7b
#   tpu_scripts/fetch.sh --project P --zone Z --name N --output rlens_jax/runs/rank --to runs/rank

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project output to)
takes=(zone name run)
parse_options "$@"

if [[ ${opt[output]} == gs://* ]]; then
    run mkdir -p "${opt[to]}"
    run gcloud storage rsync "${opt[output]}" "${opt[to]}" --recursive --project="${opt[project]}"
else
    require zone
    require name
    run mkdir -p "${opt[to]}"
    tpu tpu-vm scp "${opt[name]}:${opt[output]}" "${opt[name]}:rlens_jax/${opt[run]}.log" "${opt[to]}" --recurse --worker=0
fi
