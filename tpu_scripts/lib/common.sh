# shellcheck shell=bash
# Shared by the scripts of this folder: commands that are shown before they run, and access to workers. Sourced.
set -euo pipefail

fail() { echo "error: $1" >&2; exit "${2:-1}"; }
refuse() { fail "$1; see $(basename "$0") --help" 2; }
((BASH_VERSINFO[0] > 4)) || fail "these scripts need bash 5 or newer, not $BASH_VERSION" 2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tpu_scripts/lib/options.sh
source "$here/lib/options.sh"
# shellcheck source=tpu_scripts/lib/help.sh
source "$here/lib/help.sh"
exec 3>&1  # where --print shows commands, also those inside $(...)

quoted() {  # words as they can be pasted into a shell, whatever is in them
    local word line=""
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "${line# }"
}

printing() { [[ -n ${opt[print]} ]]; }

note() { printing || echo "$1" >&2; }

run() { if printing; then quoted "$@" >&3; else quoted "$@" >&2; "$@"; fi; }

tpu() { run gcloud compute tpus "$@" --project="${opt[project]}" --zone="${opt[zone]}"; }

ssh_worker() {  # ssh_worker WORKER COMMAND, the worker a number or `all`
    tpu tpu-vm ssh "${opt[name]}" --worker="$1" --command="$2"
}

worker_script() { ssh_worker "$1" "bash rlens_jax/source/tpu_scripts/lib/on_worker.sh $(quoted "${@:2}")"; }

cluster() { run xpk "$@" --cluster="${opt[cluster]}" --project="${opt[project]}" --zone="${opt[zone]}"; }

pass_options() {  # to the scripts that this one calls
    local name
    for name in "${!opt[@]}"; do export "$(variable "$name")=${opt[$name]}"; done
}

pack_source() {  # the last commit as dist/rlens_jax.tar.gz, in a folder source/
    local root=${here%/*}
    git -C "$root" diff --quiet HEAD || note "uncommitted changes are left out"
    run mkdir -p "$root/dist"
    run git -C "$root" archive --format=tar.gz --prefix=source/ --output="$root/dist/rlens_jax.tar.gz" HEAD
}

check_config() {  # before anything is done
    [[ $1 != */* && $1 != *.y*ml || -f $1 ]] || refuse "--config: there is no file $1"
}
