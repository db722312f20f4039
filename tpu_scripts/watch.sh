#!/usr/bin/env bash
# Follow the log of a run until it ends. Costs and changes nothing, and interrupting it leaves the run alone. Ends with exit
# code 0 if the run succeeded, 3 if it failed, and 75 if it was stopped. Any other code means that the worker cannot be
# reached, for example after a preemption; resume.sh then continues the run.
#   tpu_scripts/watch.sh --project P --zone Z --name N --run rank

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone name)
takes=(run worker lines)
parse_options "$@"

worker_script "${opt[worker]}" watch "${opt[run]}" "${opt[lines]}"
