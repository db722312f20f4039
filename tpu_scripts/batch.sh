#!/usr/bin/env bash
# Run several configurations in turn in one lease of a slice that create.sh and install.sh made; each writes to OUTPUT/NAME.
# A failed configuration does not stop the rest. After a preemption the slice is created again (as resume.sh does, at the same
# cost), and the same configuration resumes. Ends with a summary, and with exit code 1 if any failed.
#   tpu_scripts/batch.sh --project P --zone Z --name N --accelerator-type v5litepod-16 --spot \
#       --runtime-version v2-alpha-tpuv5-lite --output /mnt/shared/runs --delete-after -- qwen2_vl_7b mine.yaml

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=tpu_scripts/lib/batch.sh
source "$here/lib/batch.sh"
needs=(project zone name accelerator-type runtime-version output)
takes=(valid-until-duration create-flags poll-seconds setup attempts)
switches=(spot delete-after)
rest="CONFIG ..., presets or YAML files"
parse_options "$@"
name_runs
pass_options

attempts=${opt[attempts]}

attempt() {  # start the run with launch.sh or resume.sh, and wait for its end on all workers
    "$here/$1.sh" -- --output "${opt[output]}/$RLENS_RUN" || return
    "$here/watch.sh" || return
    "$here/watch.sh" --worker all --lines 0
}

for index in "${!arguments[@]}"; do
    export RLENS_CONFIG=${arguments[index]} RLENS_RUN=${names[index]}
    attempt launch && code=0 || code=$?
    for ((n = 2; n <= attempts; n++)); do
        [[ $code != [023] ]] || break  # it succeeded, was refused, or failed; else it was stopped, or the slice is gone
        sleep "${opt[poll-seconds]}"
        attempt resume && code=0 || code=$?
    done
    codes+=("$code")
done
summarize && code=0 || code=$?
[[ -z ${opt[delete-after]} ]] || "$here/delete.sh" --yes
exit "$code"
