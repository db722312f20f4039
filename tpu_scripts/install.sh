#!/usr/bin/env bash
# Install the last commit of this repository, with the extra `tpu`, on every worker of a slice, in ~/rlens_jax.
# Costs nothing beyond the slice. Safe to repeat, but not during a run.
#   tpu_scripts/install.sh --project P --zone Z --name N --setup 'sudo mount SERVER:/share /mnt/shared'

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone name)
takes=(setup)
parse_options "$@"

[[ -z ${opt[setup]} ]] || ssh_worker all "${opt[setup]}"
pack_source
tpu tpu-vm scp "${here%/*}/dist/rlens_jax.tar.gz" "${opt[name]}:" --worker=all
ssh_worker all "mkdir -p rlens_jax && rm -rf rlens_jax/source && tar -xzf rlens_jax.tar.gz -C rlens_jax"
worker_script all install
