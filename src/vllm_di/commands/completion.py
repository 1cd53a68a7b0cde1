"""Tab completion: ``eval "$(vllm-di --completion bash)"``. Reads YAML files alone."""

from __future__ import annotations

from vllm_di.commands.arguments import ALIASES, OPTIONS, SWITCHES, VERBS, UsageError

BASH = """\
_vllm_di() {
    local IFS=$'\\n'
    COMPREPLY=($(vllm-di __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= || ${COMPREPLY[0]} == *. ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -F _vllm_di vllm-di
"""
ZSH = """\
#compdef vllm-di
_vllm_di() {
    local -a found
    found=(${(f)"$(vllm-di __complete "${words[@]:1:$((CURRENT - 1))}" 2>/dev/null)"})
    compadd -Q -S '' -- $found
}
compdef _vllm_di vllm-di
"""
FISH = """\
complete -c vllm-di -f -a '(vllm-di __complete (commandline -opc)[2..-1] (commandline -ct))'
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def run(words: list[str]) -> int:
    """A shell's script, or the candidates for the last of some words."""
    if words[0] == "--completion":
        shell = words[1] if len(words) > 1 else ""
        if shell not in SHELLS:
            raise UsageError(f"--completion: choose one of {', '.join(SHELLS)}")
        print(SHELLS[shell], end="")
        return 0
    for candidate in candidates(words[1:] or [""]):
        print(candidate)
    return 0


def candidates(words: list[str]) -> list[str]:
    """What the last word may become."""
    last = words[-1]
    if len(words) == 1:
        return [verb for verb in VERBS if verb.startswith(last)]
    if last.startswith("-"):
        return [f for f in [*SWITCHES, *OPTIONS, *ALIASES] if f.startswith(last)]
    from vllm_di.containers.overrides import read
    from vllm_di.containers.tree import ConfigFiles

    tree = ConfigFiles.find()
    _, group, equals, option = read(last)
    if equals and group in tree.groups():
        return [f"{group}={o}" for o in tree.options(group) if o.startswith(option)]
    if "." in last:
        group = last.split(".")[0]
        chosen = [read(w).value for w in words if read(w).key == group]
        files = [p for o, p in tree.options(group).items() if not chosen or o in chosen]
        files += [p for p in (tree.roots[0] / group).glob("base.yaml")]
        keys = {f"{group}.{k}=" for p in files for k in tree.read(p).lines}
        return sorted(k for k in keys if k.startswith(last) and "_target_" not in k)
    starts = [name for name in tree.groups() if name.startswith(last)]
    return [f"{starts[0]}=", f"{starts[0]}."] if len(starts) == 1 else starts
