# Completion of tidegate for bash. The program that is typed says itself what can stand at the cursor.

_tidegate() {
    # bash splits words at ":" and "=" as well. What stands together on the line is one word here.
    local line=${COMP_LINE:0:COMP_POINT} words=() last=-1 rest word i
    for ((i = 0; i <= COMP_CWORD; i++)); do
        rest=${line#"${line%%[![:space:]]*}"}
        word=${COMP_WORDS[i]}
        ((i < COMP_CWORD)) || word=$rest
        if [[ $last -ge 0 && $rest == "$line" ]]; then
            words[last]+=$word
        else
            words[++last]=$word
        fi
        line=${rest#"$word"}
    done

    local program=${COMP_WORDS[0]/#\~\//$HOME/}
    type -P -- "$program" > /dev/null || program=tidegate

    # Only what follows the last place where bash splits is replaced.
    local current=${words[last]} kept=
    case $2 in
        "" | ":" | "=") kept=${current%"${current##*[:=]}"} ;;
        *) kept=${current%"$2"} ;;
    esac
    [[ $kept != "$current" || -z $2 ]] || kept=

    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("${word#"$kept"}")
    done < <(_TIDEGATE_COMPLETE=bash "$program" -- "${words[@]}" 2> /dev/null)

    # A folder goes on.
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[/=] ]]; then
        compopt -o nospace 2> /dev/null
    fi
}

complete -o bashdefault -o nosort -F _tidegate tidegate 2> /dev/null || complete -o bashdefault -F _tidegate tidegate
