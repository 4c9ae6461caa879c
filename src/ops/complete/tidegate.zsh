#compdef tidegate
# Completion of tidegate for zsh. The program that is typed says itself what can stand at the cursor.

_tidegate() {
    local program=${words[1]/#\~\//$HOME/}
    (( $+commands[$program] )) || [[ $program == */* && -x $program ]] || program=tidegate

    # Only a file is typed with a tilde, and zsh alone can tell what it stands for.
    if [[ $PREFIX == \~* ]]; then
        _files
        return
    fi

    local -a offered folders
    local line
    for line in "${(@f)$(_TIDEGATE_COMPLETE=zsh $program -- "${(@)words[1,CURRENT-1]}" "$PREFIX" 2> /dev/null)}"; do
        case $line in
            "") ;;
            */) folders+=("${line%/}") ;;
            *) offered+=("$line") ;;
        esac
    done
    (( $#folders )) && _describe -V folder folders -S / -r /
    (( $#offered )) && _describe -V value offered
    (( $#folders + $#offered ))
}

# Installed in a folder of $fpath this file is the function, and is wanted for its answer at once; sourced, it is registered.
if [[ ${funcstack[1]} == _tidegate ]]; then
    _tidegate "$@"
else
    compdef _tidegate tidegate
fi
