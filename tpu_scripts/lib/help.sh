# shellcheck shell=bash
# The text of --help. Sourced by common.sh.
# shellcheck disable=SC2154  # what is not assigned here comes from options.sh
declare -A about=(
    [project]="Google Cloud project" [zone]="zone of the slice or cluster" [name]="the slice (and its queued resource)"
    [accelerator-type]="type and size of the slice, such as v5litepod-16" [spot]="spot capacity: cheaper, can be preempted"
    [runtime-version]="software of the TPU VMs, such as v2-alpha-tpuv5-lite" [valid-until-duration]="max time to wait, such as 6h"
    [create-flags]="further flags of gcloud's create, after =, such as '--network=N --reserved'"
    [setup]="command for every worker before the installation, safe to repeat, such as one that mounts the shared folder"
    [config]="a preset's name, or a YAML file here" [run]="name of the run: its log is ~/rlens_jax/RUN.log"
    [output]="folder of the results" [to]="local folder" [worker]="number of a worker, or all" [lines]="earlier lines to show"
    [poll-seconds]="seconds between checks of the state" [attempts]="max starts per configuration"
    [delete-after]="delete the slice at the end" [yes]="do not ask for confirmation" [print]="show each command, run none"
    [cluster]="the GKE cluster" [workload]="the GKE workload: lower-case letters, digits, -" [whole-cluster]="the cluster itself"
    [bucket]="Cloud Storage bucket to mount at /shared in every workload"
    [max-restarts]="max restarts of a workload after preemptions"
    [docker-image]="image with rlens_jax[tpu,gcs] inside" [base-docker-image]="image with Python 3.11+ to add the last commit to"
)

usage() {
    local name
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    printf '\nOptions; a default can be set in the environment, such as RLENS_ZONE for --zone:\n'
    for name in "${needs[@]}" "${takes[@]}" "${switches[@]}" print; do
        printf '  --%-21s %s%s\n' "$name" "${about[$name]}" "${opt[$name]:+ (${opt[$name]})}"
    done
    [[ -z $rest ]] || printf '  -- %-20s %s\n' ... "$rest"
    exit 0
}
