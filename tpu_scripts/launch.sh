#!/usr/bin/env bash
# Start a ranking run, `python -m rlens_jax.rank`, on every worker of a slice; it continues if this terminal is closed. Costs
# nothing beyond the slice. A run that is still active is left alone; a stopped run resumes from its journal in --output. So
# choose a folder that all workers share and that outlives the slice.
#   tpu_scripts/launch.sh --project P --zone Z --name N --config qwen2_vl_7b -- --output /mnt/shared/runs/qwen2_vl_7b

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone name config)
takes=(run)
rest="fields of rlens_jax.rank, such as --output FOLDER (python -m rlens_jax.rank --help)"
parse_options "$@"

config=${opt[config]}
check_config "$config"
if [[ -f $config ]]; then
    tpu tpu-vm scp "$config" "${opt[name]}:rlens_jax/${opt[run]}.yaml" --worker=all
    config=./${opt[run]}.yaml
fi
worker_script all start "${opt[run]}" --config "$config" "${arguments[@]}"
