"""Fields that other servers know and this one does not: which are left out silently, with a warning, or refused.

Owns their names and the values with which they ask for nothing. Fields that are known here are bodies.py's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from yafsdp_like.inference.http.errors import invalid

MAX_NAMED, MAX_NAME_LENGTH = 16, 64  # ignored fields in a header

# With one of these values a field of vLLM, SGLang or llama.cpp asks for what is done anyway; null always does.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "cache_prompt": (True, False),
    "chat_template": ("",),
    "detokenize": (True,),
    "documents": ([],),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "echo": (False,),
    "grammar": ("",),
    "id_slot": (-1,),
    "include_reasoning": (True, False),
    "length_penalty": (1, 0),
    "mirostat": (0,),
    "n_probs": (0,),
    "no_stop_trim": (False,),
    "priority": (0,),  # where requests may not say how urgent they are
    "repeat_last_n": (-1, 64),
    "repeat_penalty": (1,),
    "return_hidden_states": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True, False),
    "spaces_between_special_tokens": (True, False),
    "stream_reasoning": (True, False),
    "tfs_z": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
# Say who asks, or how the answer is computed, whatever their value.
SILENT = frozenset({"request_id", "rid", "session_params", "guided_decoding_backend", "timings_per_token"})


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field that is not known here asks for nothing."""
    return value is None or name in SILENT or any(_same(value, each) for each in NEUTRAL.get(name, ()))


def leave_out(
    sent: Mapping[Any, Any], known: Collection[str], path: str = "", is_strict: bool = False
) -> tuple[dict[Any, Any], list[str]]:
    """Return the known fields of an object, and the names of others that ask for something.

    Raises ApiError for the latter where ``is_strict``. ``path`` is what comes before the names.
    """
    kept = {name: value for name, value in sent.items() if name in known or not isinstance(name, str)}
    ignored = [path + name for name, value in sent.items() if name not in kept and not is_neutral(name, value)]
    if ignored and is_strict:
        raise invalid(ignored[0], "no such field is known here")
    return kept, ignored


def header_of(ignored: Collection[str]) -> dict[str, str]:
    """Return the header that names ignored fields, if there are any."""
    if not ignored:
        return {}
    names = [_printable(name) for name in list(dict.fromkeys(ignored))[:MAX_NAMED]]
    return {"x-ignored-fields": ", ".join(names)}


def _printable(name: str) -> str:
    safe = name[:MAX_NAME_LENGTH].encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isalnum() or character in "_-.[]" else "?" for character in safe)


def _same(value: Any, other: Any) -> bool:
    """1 is 1.0, but not True."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
