#!/usr/bin/env bash
# Delete a slice and its queued resource, which ends its cost. Data only on its disks is lost: run fetch.sh first.
# gcloud asks for confirmation, unless --yes.
#   tpu_scripts/delete.sh --project P --zone Z --name N

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone name)
switches=(yes)
parse_options "$@"

tpu queued-resources delete "${opt[name]}" --force ${opt[yes]:+--quiet}
