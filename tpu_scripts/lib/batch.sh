# shellcheck shell=bash
# Shared by the two batch runners. Sourced after common.sh.
# shellcheck disable=SC2154  # what is not assigned here comes from there
names=() codes=()

name_runs() {  # names: one for each configuration, its file's name without folder and ending
    ((${#arguments[@]})) && [[ " ${arguments[*]}" != *" -"* ]] || refuse "name the configurations after --, and nothing else"
    names=("${arguments[@]##*/}")
    names=("${names[@]%.y*ml}")
    local twice
    twice=$(printf '%s\n' "${names[@]}" | sort | uniq --repeated)
    [[ -z $twice ]] || refuse "several configurations would be called ${twice//$'\n'/, }"
}

summarize() {  # by codes, the exit code of each; 1 if any failed
    local index failed=0 line lines=""
    ! printing || return 0
    for index in "${!names[@]}"; do
        line="done    ${arguments[index]}"
        ((codes[index] == 0)) || { line="failed  ${arguments[index]} (exit code ${codes[index]})"; failed=$((failed + 1)); }
        lines+="  $line"$'\n'
    done
    printf '%s\n%s' "${#names[@]} configurations, $failed failed:" "$lines"
    ((failed == 0))
}
