#!/usr/bin/env bash
# Follow the log of a run until it ends; costs and changes nothing, and interrupting it leaves the run alone.
# Ends with 0 when the run succeeded, with 3 when it failed; with 75 when it was stopped, or another code when the worker
# cannot be reached, as after a preemption: then resume.sh goes on.
#   tpu_scripts/watch.sh --project P --zone Z --name N --run rank

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone name)
takes=(run worker lines)
parse_options "$@"

worker_script "${opt[worker]}" watch "${opt[run]}" "${opt[lines]}"
