"""`rcpo completion bash`: shell code that completes commands, config groups, options and keys on TAB.

The words of `rcpo train` come from Hydra, asked in a process of its own; nothing heavy is imported for it.
"""

from rcpo.commands import COMMANDS
from rcpo.common.errors import UserError

HELP = """usage: rcpo completion bash

Print the code that completes rcpo's words on TAB. To have it in every new shell, put this line in ~/.bashrc:

  eval "$(rcpo completion bash)"

Then TAB completes commands (rcpo tr), groups and options (rcpo train objective=s), keys (rcpo train
train.st), your own options behind --config-dir DIR, flags, and files (rcpo train data.path=pa)."""

BASH = r"""# rcpo: completion for bash. Put this in ~/.bashrc: eval "$(rcpo completion bash)"
_rcpo() {
    local line="${COMP_LINE:0:COMP_POINT}" word choices number
    local words=($line) flags=() query="rcpo-train"
    [[ "$line" == *" " ]] && words+=("")
    word="${words[-1]}"
    if (( ${#words[@]} <= 2 )); then
        COMPREPLY=($(compgen -W "@COMMANDS@" -- "$word"))
        (( ${#COMPREPLY[@]} == 1 )) && COMPREPLY[0]+=" "
        return
    fi
    case "${words[1]}" in
        completion) COMPREPLY=($(compgen -W "bash" -- "$word")) ;;
        resume|status|cancel|sync)
            COMPREPLY=($(compgen -d -- "$word")) ;;
        compare|watch|dashboard)
            case "${words[1]}" in
                compare) choices="@COMPARE_FLAGS@" ;;
                watch) choices="--help --once" ;;
                *) choices="--help --print --dry-run --update" ;;
            esac
            [[ "$word" == -* ]] || choices=$(compgen -f -- "$word")
            [[ "${words[-2]}" == --ches ]] && choices="auto yes no"
            COMPREPLY=($(compgen -W "$choices" -- "$word")) ;;
        train|sweep|score|bench)
            if [[ "$word" == -* ]]; then
                case "${words[1]}" in
                    sweep) choices="@SWEEP_FLAGS@" ;;
                    score) choices="@SCORE_FLAGS@" ;;
                    bench) choices="@BENCH_FLAGS@" ;;
                    *) choices="@FLAGS@" ;;
                esac
                COMPREPLY=($(compgen -W "$choices" -- "$word"))
                return
            fi
            [[ "${words[-2]}" == --baseline ]] && choices="plain response trl"
            [[ -n "$choices" ]] && { COMPREPLY=($(compgen -W "$choices" -- "$word")); return; }
            case "${words[-2]}" in --out|--json|--profile)
                COMPREPLY=($(compgen -f -- "$word")); return ;; esac
            [[ "${words[-2]}" == --config-dir ]] && { COMPREPLY=($(compgen -d -- "$word")); return; }
            for (( number = 2; number < ${#words[@]} - 1; number++ )); do
                case "${words[number]}" in
                    --config-dir) flags=(--config-dir "${words[++number]}") ;;
                    --shape|--lengths|--variant) (( number++ )) ;;  # values of rcpo bench that hold a =
                    *=*) query+=" ${words[number]}" ;;
                esac
            done
            query+=" $word"
            choices=$(COMP_LINE="$query" COMP_POINT=${#query} \
                "${words[0]}" train "${flags[@]}" -sc query=bash 2>/dev/null | tr ' ' '\n' | grep -v '^hydra')
            [[ "${words[1]}" == sweep && "$word" != *=* ]] && choices+=" $(compgen -f -- "$word")"
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
            if (( ${#COMPREPLY[@]} == 0 )) && [[ "$word" == *=* ]]; then  # a key whose value may be a file
                COMPREPLY=($(compgen -P "${word%%=*}=" -f -- "${word#*=}"))
            fi ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _rcpo rcpo
"""
SWEEP_FLAGS = (
    "--help --dry-run --pairs-per-second --out --parallel --slurm --max-parallel --print --wandb-sweep"
)
COMPARE_FLAGS = "--help --wandb --where --sort --csv --json --markdown --latex --html --ches --pdf --png"
BENCH_FLAGS = (
    "--help --calibrations --variant --baseline --steps --warmup --repeats --shape --lengths --config-dir "
    "--json --profile --head-curve"
)
SCORE_FLAGS = "--help --out --overwrite --config-dir"
FLAGS = "--help --cfg --package --config-dir --overwrite"


def run(words: list[str]) -> int:
    """Print the code; returns the exit code."""
    if words in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if words != ["bash"]:
        said = f"{' '.join(words)}: no completion for that shell" if words else "completion takes a shell"
        raise UserError(f"{said}; type rcpo completion bash")
    code = BASH.replace("@COMMANDS@", " ".join(COMMANDS))
    code = code.replace("@FLAGS@", FLAGS).replace("@SWEEP_FLAGS@", SWEEP_FLAGS)
    code = code.replace("@SCORE_FLAGS@", SCORE_FLAGS).replace("@BENCH_FLAGS@", BENCH_FLAGS)
    print(code.replace("@COMPARE_FLAGS@", COMPARE_FLAGS))
    return 0
