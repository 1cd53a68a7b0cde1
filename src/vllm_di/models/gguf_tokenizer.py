"""From a GGUF file's vocabulary to a ``tokenizer.json``, equal to llama.cpp's tokenizer.

Two kinds are known: SentencePiece (``tokenizer.ggml.model`` is ``llama``) and byte-level BPE
(``gpt2``). Anything that cannot be said exactly in a ``tokenizer.json`` is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from vllm_di.errors import CheckpointError, UnsupportedModelError, nearest
from vllm_di.models.gguf_pretokenizers import PRE_TOKENIZERS

Facts = Mapping[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``tokenizer.ggml.token_type`` (ggml-org/ggml, docs/gguf.md)."""
SPACE = "▁"
PREFIX = "tokenizer.ggml."
USED = frozenset(
    [
        "model",
        "pre",
        "tokens",
        "scores",
        "token_type",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
        "eot_token_id",
        "eom_token_id",
    ]
)
"""Keys behind ``tokenizer.ggml.`` that are read here or in ``gguf_config``."""
IRRELEVANT = frozenset(
    [
        "padding_token_id",
        "seperator_token_id",
        "mask_token_id",
        "cls_token_id",
        "token_type_count",
        "fim_pre_token_id",
        "fim_suf_token_id",
        "fim_mid_token_id",
        "fim_pad_token_id",
        "fim_rep_token_id",
        "fim_sep_token_id",
        "prefix_token_id",
        "suffix_token_id",
        "middle_token_id",
    ]
)
"""Of other tasks than writing on."""


def build_tokenizer(facts: Facts) -> Tokenizer:
    """The tokenizer of a GGUF's metadata. Raises UnsupportedModelError for a kind that is not
    known, CheckpointError for a damaged vocabulary."""
    _check_keys(facts)
    tokens, types = _tokens(facts)
    model = facts.get(f"{PREFIX}model")
    build = {"llama": _sentencepiece, "gpt2": _byte_level}.get(str(model))
    if build is None:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model {model!r} is not supported (llama and gpt2 are); "
            "take the model's safetensors"
        )
    tokenizer = build(facts, tokens, types)
    _add_tokens(tokenizer, facts, tokens, types)
    _add_ends(tokenizer, facts, tokens)
    return tokenizer


def tokenizer_config(facts: Facts) -> dict[str, Any]:
    """``tokenizer_config.json``: the tokens that begin and end a text, and the chat templates."""
    tokens = facts[f"{PREFIX}tokens"]
    config: dict[str, Any] = {
        f"{name}_token": tokens[_checked(token_id, tokens, name)]
        for name, token_id in _marks(facts).items()
        if token_id is not None
    }
    template = facts.get("tokenizer.chat_template")
    named = {
        key.removeprefix("tokenizer.chat_template."): value
        for key, value in facts.items()
        if key.startswith("tokenizer.chat_template.")
    }
    if named:
        named |= {"default": template} if template is not None else {}
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    elif template is not None:
        config["chat_template"] = template
    return config


def _check_keys(facts: Facts) -> None:
    for key, value in facts.items():
        name = key.removeprefix(PREFIX)
        if name == key or name in USED or name in IRRELEVANT:
            continue
        if isinstance(value, (list, str)) or value:
            raise UnsupportedModelError(
                f"{key} is set, which is not known here{nearest(name, USED)}; take the model's "
                "safetensors"
            )


def _tokens(facts: Facts) -> tuple[list[str], list[int]]:
    """Their texts, each one unique, and their types."""
    tokens = facts.get(f"{PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError("tokenizer.ggml.tokens is missing: the file brings no vocabulary")
    types = facts.get(f"{PREFIX}token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    first: dict[str, int] = {}
    texts, types = list(tokens), [int(kind) for kind in types]
    for token_id, text in enumerate(tokens):
        if text and first.setdefault(text, token_id) == token_id:
            continue
        if text and types[token_id] in (NORMAL, USER_DEFINED):
            raise CheckpointError(
                f"tokenizer.ggml.tokens: {text!r} is there twice, as {first[text]} and {token_id}"
            )
        texts[token_id], types[token_id] = f"[EMPTY_{token_id}]", UNUSED
    return texts, types


# ------------------------------------------------------------------------------------------------
# SentencePiece


def _sentencepiece(facts: Facts, tokens: list[str], types: list[int]) -> Tokenizer:
    if facts.get(f"{PREFIX}remove_extra_whitespaces"):
        raise UnsupportedModelError("tokenizer.ggml.remove_extra_whitespaces is not supported")
    _check_letters(tokens, types)
    scores = facts.get(f"{PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(
            "tokenizer.ggml.scores is missing or of another length than the tokens: the order of "
            "a SentencePiece vocabulary's merges follows from it"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, text in enumerate(tokens)},
            merges=_merges_of_scores(tokens, types, scores),
            unk_token=tokens[_checked(_marks(facts)["unk"], tokens, "unk")],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # A space before each text, also before one that begins with a space, and behind each token that
    # is matched whole: `Prepend` sees every piece between those, where `Metaspace` would spare
    # texts that have a space already.
    has_prefix = bool(facts.get(f"{PREFIX}add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if has_prefix else [])
    )
    return tokenizer


def _check_letters(tokens: Sequence[str], types: Sequence[int]) -> None:
    """A `tokenizer.json` merges tokens, SentencePiece merges characters: they are one only where
    each character of a token is a token itself."""
    known = set(tokens)
    for text, kind in zip(tokens, types, strict=True):
        if kind == NORMAL and len(text) > 1 and not known.issuperset(text):
            missing = next(char for char in text if char not in known)
            raise UnsupportedModelError(
                f"tokenizer.ggml.tokens has {text!r}, but no token {missing!r} to make it of; "
                "take the model's safetensors"
            )


def _merges_of_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union has the highest score: each way to make
    a token of two others is a merge, ranked by the token's score."""
    parts = {t for t, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    order = sorted(
        (i for i, text in enumerate(tokens) if len(text) > 1 and text in parts),
        key=lambda i: (-scores[i], i),
    )
    return [
        (text[:cut], text[cut:])
        for text in (tokens[i] for i in order)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in parts and text[cut:] in parts
    ]


# ------------------------------------------------------------------------------------------------
# byte-level BPE


def _byte_level(facts: Facts, tokens: list[str], types: list[int]) -> Tokenizer:
    name = facts.get(f"{PREFIX}pre")
    if name is None:
        raise UnsupportedModelError(
            "tokenizer.ggml.pre is missing: the file does not say how its vocabulary cuts text; "
            "convert the model anew with a llama.cpp of May 2024 or later, or take its safetensors"
        )
    kind = PRE_TOKENIZERS.get(str(name))
    if kind is None:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre {name!r} is not supported{nearest(str(name), PRE_TOKENIZERS)}; "
            f"supported are {', '.join(PRE_TOKENIZERS)}"
        )
    if facts.get(f"{PREFIX}add_space_prefix"):
        raise UnsupportedModelError(
            "tokenizer.ggml.add_space_prefix in a byte-level vocabulary is not supported"
        )
    merges = facts.get(f"{PREFIX}merges")
    if not isinstance(merges, list):
        raise CheckpointError("tokenizer.ggml.merges is missing: a byte-level vocabulary needs it")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, text in enumerate(tokens)},
            merges=pairs,
            ignore_merges=kind.whole_words,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in kind.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# ------------------------------------------------------------------------------------------------
# what both share


def _add_tokens(
    tokenizer: Tokenizer, facts: Facts, tokens: Sequence[str], types: Sequence[int]
) -> None:
    """Control tokens are special; the user's own are plain text. Both are found before anything
    else in a text."""
    strips = _strips_right(facts)

    def added(text: str, *, special: bool) -> AddedToken:
        return AddedToken(text, normalized=False, special=special, rstrip=strips(text))

    typed = list(zip(tokens, types, strict=True))
    special = [t for t, kind in typed if kind in (CONTROL, UNKNOWN)]
    own = [t for t, kind in typed if kind == USER_DEFINED]
    tokenizer.add_special_tokens([added(t, special=True) for t in special])
    tokenizer.add_tokens([added(t, special=False) for t in own])


def _strips_right(facts: Facts) -> Callable[[str], bool]:
    """Whether a token takes the spaces behind it away. A GGUF does not say so; llama.cpp goes by
    the model's name."""
    name = str(facts.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return lambda text: False
    return lambda text: text not in ("<unk>", "<s>", "<|endoftext|>")


def _marks(facts: Facts) -> dict[str, Any]:
    """Ids of the tokens that have a role; llama.cpp's defaults for a SentencePiece vocabulary."""
    defaults = {"bos": 1, "eos": 2, "unk": 0} if facts.get(f"{PREFIX}model") == "llama" else {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        mark: facts.get(f"{PREFIX}{name}_token_id", defaults.get(mark))
        for mark, name in names.items()
    }


def _add_ends(tokenizer: Tokenizer, facts: Facts, tokens: Sequence[str]) -> None:
    """What is put before and behind each text."""
    is_piece = facts.get(f"{PREFIX}model") == "llama"
    kind = PRE_TOKENIZERS.get(str(facts.get(f"{PREFIX}pre")))
    marks = _marks(facts)
    begins = facts.get(f"{PREFIX}add_bos_token")
    if begins is None:
        by_default = is_piece or (kind is not None and kind.adds_bos)
        begins = by_default and marks["bos"] is not None
    wanted = {"bos": bool(begins), "eos": bool(facts.get(f"{PREFIX}add_eos_token"))}
    added: dict[str, tuple[str, int]] = {}
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        token_id = marks[name]
        if token_id is None:
            raise CheckpointError(
                f"tokenizer.ggml.add_{name}_token is set without a {name}_token_id"
            )
        added[name] = (tokens[_checked(token_id, tokens, name)], int(token_id))
    if not added:
        return
    before = [f"{added['bos'][0]}:0"] if "bos" in added else []
    behind = [f"{added['eos'][0]}:0"] if "eos" in added else []
    tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A:0", *behind],
        pair=["$A:0", "$B:1"],
        special_tokens=list(added.values()),
    )
    if tokenizer.encode("").ids != [token_id for _, token_id in added.values()]:
        names = " and ".join(repr(text) for text, _ in added.values())
        raise UnsupportedModelError(f"{names} cannot stand before or behind a text")


def _checked(token_id: Any, tokens: Sequence[str], name: str) -> int:
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise CheckpointError(
            f"the GGUF's id of the {name} token is {token_id!r}: expected one below {len(tokens)}"
        )
    return token_id
