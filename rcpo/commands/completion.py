"""`rcpo completion bash`: shell code that completes commands, config groups, options and keys on TAB."""

from rcpo.cli import COMMANDS
from rcpo.errors import UserError

BASH = r"""# rcpo: completion for bash. Put this in ~/.bashrc: eval "$(rcpo completion bash)"
_rcpo() {
    local word="${COMP_WORDS[COMP_CWORD]}" line choices
    line="${COMP_LINE:0:COMP_POINT}"
    local words=($line)
    [[ "$line" == *" " ]] && words+=("")
    if (( ${#words[@]} <= 2 )); then
        COMPREPLY=($(compgen -W "@COMMANDS@" -- "${words[1]}"))
        (( ${#COMPREPLY[@]} == 1 )) && COMPREPLY[0]+=" "
        return
    fi
    word="${words[-1]}"
    case "${words[1]}" in
        train)
            choices=$(COMP_POINT=$COMP_POINT COMP_LINE="${words[0]} ${line#* * }" \
                "${words[0]}" train -sc query=bash 2>/dev/null)
            COMPREPLY=($(compgen -W "$choices" -- "$word")) ;;
        completion) COMPREPLY=($(compgen -W "bash" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _rcpo rcpo
"""


def run(words: list[str]) -> int:
    """Print the code; returns the exit code."""
    if words[:1] in (["-h"], ["--help"], []):
        print('usage: eval "$(rcpo completion bash)"   (put that line into ~/.bashrc)')
        return 0 if words else 2
    if words != ["bash"]:
        raise UserError(f"{' '.join(words)}: no completion for that shell; type rcpo completion bash")
    print(BASH.replace("@COMMANDS@", " ".join(COMMANDS)))
    return 0
