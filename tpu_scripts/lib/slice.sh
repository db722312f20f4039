# shellcheck shell=bash
# The state of a slice, for the scripts that create one. Sourced after common.sh.
# shellcheck disable=SC2154  # what is not assigned here comes from there

describe() {  # describe KIND FIELD ASSUMED: asked again and again, so only --print shows it, and goes on with ASSUMED
    local command=(gcloud compute tpus "$1" describe "${opt[name]}" --project="${opt[project]}" --zone="${opt[zone]}")
    command+=("--format=value($2)")
    if printing; then quoted "${command[@]}" >&3; echo "$3"; else "${command[@]}"; fi
}

slice_state() {  # of the queued resource, and once this is ACTIVE of its node: READY when it can be used
    local state
    state=$(describe queued-resources state.state "${1:-ACTIVE}") || fail "the state of ${opt[name]} cannot be read"
    [[ $state != ACTIVE ]] || state=$(describe tpu-vm state READY) || fail "the node of ${opt[name]} cannot be read"
    echo "$state"
}

lost() { [[ $1 == @(SUSPENDED|FAILED|PREEMPTED|TERMINATED|STOPPED) ]]; }

wait_until_ready() {
    local state="" last
    until [[ $state == READY ]]; do
        [[ -z $state ]] || sleep "${opt[poll-seconds]}"
        last=$state
        state=$(slice_state)
        [[ $state == "$last" ]] || note "${opt[name]}: $state"
        ! lost "$state" || fail "${opt[name]} was not granted or is lost; resume.sh creates it again, delete.sh withdraws it"
    done
}
