#!/usr/bin/env bash
# Create a GKE cluster with one TPU slice through XPK, and mount a bucket at /shared in its workloads. From then until
# gke_delete.sh --whole-cluster it costs money, even if nothing runs: the slice (on demand, or with --spot at a fraction of
# that) and the cluster's CPU nodes. Safe to repeat after a failure.
#   tpu_scripts/gke_create.sh --project P --zone Z --cluster C --accelerator-type v5litepod-16 --bucket B --spot

# shellcheck source=tpu_scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
needs=(project zone cluster accelerator-type bucket)
switches=(spot)
parse_options "$@"

[[ -n ${opt[spot]} ]] && capacity=--spot || capacity=--on-demand
cluster cluster create --tpu-type="${opt[accelerator-type]}" --num-slices=1 "$capacity" --enable-gcsfuse-csi-driver
cluster storage attach rlens-shared --type=gcsfuse --bucket="${opt[bucket]}" --mount-point=/shared --auto-mount=true \
    --readonly=false --size=1
