#!/usr/bin/env bash
# valkey-cli for machines that have none: says commands to a Valkey of this machine, and prints the answers as valkey-cli does into a pipe.
#
#   valkey-cli.sh PORT COMMAND WORD...     one command
#   valkey-cli.sh PORT < FILE              a command a line, over one connection
set -u
export LC_ALL=C
port=$1
shift
exec 3<> "/dev/tcp/127.0.0.1/$port"

say() {
    local request part word
    printf -v request '*%d\r\n' $#
    for word; do
        printf -v part '$%d\r\n%s\r\n' ${#word} "$word"
        request+=$part
    done
    printf '%s' "$request" >&3
    answer
}

answer() {
    local line rest text n
    IFS= read -r line <&3 || exit 1
    line=${line%$'\r'}
    rest=${line:1}
    case $line in
    '$-1' | '*-1') echo ;;
    '$'*)
        IFS= read -r -N $((rest + 2)) text <&3
        printf '%s\n' "${text%$'\r\n'}"
        ;;
    '*'*) for ((n = 0; n < rest; n++)); do answer; done ;;
    *) printf '%s\n' "$rest" ;;
    esac
}

if [ $# -gt 0 ]; then
    say "$@"
else
    while read -r -a words; do say "${words[@]}"; done
fi
