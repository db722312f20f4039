#!/usr/bin/env bash
# Request a TPU slice (a queued resource with one node), and wait until it is ready. From then until delete.sh it costs money,
# per second and chip: on demand at the list price, with --spot at a fraction of it.
# Interrupting the wait does not withdraw the request; resume.sh waits again, and delete.sh withdraws it.
#   tpu_scripts/create.sh --project P --zone Z --name N --accelerator-type v5litepod-16 \
#       --runtime-version v2-alpha-tpuv5-lite --spot

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=tpu_scripts/lib/slice.sh
source "$here/lib/slice.sh"
needs=(project zone name accelerator-type runtime-version)
takes=(valid-until-duration create-flags poll-seconds)
switches=(spot)
parse_options "$@"

read -ra flags <<<"${opt[create-flags]}"
[[ -z ${opt[spot]} ]] || flags+=(--spot)
[[ -z ${opt[valid-until-duration]} ]] || flags+=(--valid-until-duration="${opt[valid-until-duration]}")
tpu queued-resources create "${opt[name]}" --node-id="${opt[name]}" --accelerator-type="${opt[accelerator-type]}" \
    --runtime-version="${opt[runtime-version]}" "${flags[@]}"
wait_until_ready
