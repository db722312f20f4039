#!/usr/bin/env bash
# Runs on a TPU VM for the other scripts, in ~/rlens_jax; changes nothing elsewhere and costs nothing.
#   on_worker.sh install | start RUN ARGUMENT... | watch RUN LINES
# `watch` ends with the run: 0 if it succeeded, 75 if it was stopped and can resume (SIGTERM, a lost process), 3 if it
# failed; so any other code is gcloud's or ssh's own.
set -euo pipefail
cd ~/rlens_jax
alive() { grep -qs rlens_jax "/proc/$(cat "$1.pid" 2>/dev/null)/cmdline"; }

case $1 in
    install)  # uv brings a Python, for that of a TPU VM can be too old; the variable is for Ubuntu 24.04 and later
        PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --allow-existing --python 3.11 venv
        python3 -m uv pip install --quiet --python venv/bin/python --reinstall-package rlens-jax './source[tpu,gcs]'
        ;;
    start)  # ssh tries again when a connection breaks, so a second start of the same run must do no harm
        for file in *.pid; do
            other=${file%.pid}
            ! alive "$other" || { echo "$other is running on $(hostname)" >&2; [[ $other == "$2" ]] && exit 0 || exit 1; }
        done
        rm -f "$2.exit"
        # shellcheck disable=SC2016  # expanded by the inner shell
        setsid nohup bash -c 'venv/bin/python -m rlens_jax.rank "${@:2}" && code=0 || code=$?; echo "$code" >"$1.exit"' \
            bash "${@:2}" >>"$2.log" 2>&1 </dev/null &
        echo $! >"$2.pid"
        ;;
    watch)
        [[ -e $2.pid ]] || { echo "error: there is no run $2 on $(hostname)" >&2; exit 3; }
        tail --lines="$3" --sleep-interval=0.5 --pid="$(cat "$2.pid")" --follow=name "$2.log"
        code=$(cat "$2.exit" 2>/dev/null) || code="unknown, it was killed"
        echo "$2 ended on $(hostname) with exit code $code"
        case $code in 0) ;; 75 | 143 | unknown*) exit 75 ;; *) exit 3 ;; esac
        ;;
esac
