#!/usr/bin/env bash
# After a preemption: delete the rest of the slice, create it again, install, and launch the same command, which resumes from
# its journal. Costs money as create.sh does. Takes the options of create.sh, install.sh and launch.sh. A slice that still
# exists is not touched: only the run is started, unless it is active.
#   tpu_scripts/resume.sh --project P --zone Z --name N --accelerator-type v5litepod-16 \
#       --runtime-version v2-alpha-tpuv5-lite --spot --config qwen2_vl_7b -- --output /mnt/shared/runs/qwen2_vl_7b

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=tpu_scripts/lib/slice.sh
source "$here/lib/slice.sh"
needs=(project zone name accelerator-type runtime-version config)
takes=(valid-until-duration create-flags poll-seconds setup run)
switches=(spot)
rest="fields of rlens_jax.rank, the same as for launch.sh"
parse_options "$@"
check_config "${opt[config]}"
pass_options

state=$(slice_state SUSPENDED)
while [[ $state == @(SUSPENDING|DELETING) ]]; do
    sleep "${opt[poll-seconds]}"
    state=$(slice_state)
done
note "${opt[name]}: $state"
if lost "$state"; then
    tpu queued-resources delete "${opt[name]}" --force --quiet  # --force: a preempted node can still be listed
    "$here/create.sh"
    "$here/install.sh"
elif [[ $state != READY ]]; then  # on its way: an earlier create.sh or resume.sh was interrupted
    wait_until_ready
    "$here/install.sh"
fi
"$here/launch.sh" -- "${arguments[@]}"
