# shellcheck shell=bash
# The options of the scripts. One names its own in `needs`, `takes` and `switches`, what may follow -- in `rest`, and
# calls `parse_options "$@"`; values are then in `opt`, what followed -- in `arguments`. Sourced by common.sh.
declare -A kind=([print]=switch)
declare -A opt=([run]=rank [worker]=0 [lines]=100 [poll-seconds]=30 [attempts]=10 [max-restarts]=10)
opt[base-docker-image]=python:3.11
needs=() takes=() switches=() arguments=() rest=""

nearest() {  # the option that begins most like $1
    local name length longest=1 best=""
    for name in "${!kind[@]}"; do
        for ((length = ${#1}; length > longest; length--)); do
            [[ $name != "${1:0:length}"* ]] || { longest=$length best=$name; }
        done
    done
    [[ -z $best ]] || echo " (did you mean --$best?)"
}

variable() { local name=${1//-/_}; echo "RLENS_${name^^}"; }

require() { [[ -n ${opt[$1]:-} ]] || refuse "--$1 is missing (or set $(variable "$1"))"; }

parse_options() {
    local name from
    for name in "${needs[@]}" "${takes[@]}"; do kind[$name]=value; done
    for name in "${switches[@]}"; do kind[$name]=switch; done
    for name in "${!kind[@]}"; do
        from=$(variable "$name")
        opt[$name]=${!from:-${opt[$name]:-}}
        [[ ${kind[$name]}:${opt[$name]} != switch:?* || ${opt[$name]} == yes ]] || refuse "$from must be yes or not set"
    done
    while (($#)); do
        name=${1%%=*} name=${name#--}
        case $1:${kind[${name:-none}]:-unknown} in
            --help:* | -h:*) usage ;;
            --:*)
                [[ -n $rest ]] || refuse "nothing may follow --"
                [[ " $* " != *" --print "* ]] || refuse "--print must come before --"
                # shellcheck disable=SC2034  # for the scripts
                arguments=("${@:2}")
                break
                ;;
            --[a-z]*:unknown) refuse "unknown option --$name$(nearest "$name")" ;;
            --[a-z]*=*:switch) refuse "--$name takes no value" ;;
            --[a-z]*:switch) opt[$name]=yes ;;
            --[a-z]*=*:value) opt[$name]=${1#*=} ;;
            --[a-z]*:value) [[ -n ${2:-} && $2 != --* ]] || refuse "--$name needs a value"; opt[$name]=$2; shift ;;
            *) refuse "unexpected argument '$1'" ;;
        esac
        shift
    done
    for name in "${needs[@]}"; do require "$name"; done
    [[ ${opt[run]} =~ ^[A-Za-z0-9._-]+$ ]] || refuse "--run must be letters, digits, '.', '_' and '-', not '${opt[run]}'"
}
