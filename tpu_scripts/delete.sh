#!/usr/bin/env bash
# Delete a slice and its queued resource; that ends its cost. What is only on its disks is lost: fetch.sh first.
# gcloud asks before it does so, unless --yes.
#   tpu_scripts/delete.sh --project P --zone Z --name N

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone name)
switches=(yes)
parse_options "$@"

tpu queued-resources delete "${opt[name]}" --force ${opt[yes]:+--quiet}
