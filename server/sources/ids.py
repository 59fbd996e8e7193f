"""Which strings may name an adapter. Owns the rules that every source shares; called before any id reaches a disk or a network."""

import unicodedata

from server.sources.base import raise_invalid

MAX_ID_BYTES = 1024  # S3's bound for a key
MAX_SEGMENT_BYTES = 255  # NAME_MAX of the usual file systems


def split_id(adapter_id: str) -> list[str]:
    """The id's segments, `team/adapter` -> ["team", "adapter"]. ValidationFailed unless it is a plain relative path.

    Refused: empty segments (so also absolute paths), `.`, `..` and hidden names, backslashes, control and invisible characters,
    characters that only look like others (the id must be in Unicode's form NFKC, UAX 15), blanks around a segment."""
    if not adapter_id:
        raise_invalid(adapter_id, "it is empty")
    for character in adapter_id:
        category = unicodedata.category(character)
        if category[0] == "C" or category in ("Zl", "Zp"):
            raise_invalid(adapter_id, f"character U+{ord(character):04X} is not allowed")
    if len(adapter_id.encode()) > MAX_ID_BYTES:
        raise_invalid(adapter_id, f"it is longer than {MAX_ID_BYTES} bytes")
    if unicodedata.normalize("NFKC", adapter_id) != adapter_id:
        raise_invalid(adapter_id, "it must be in Unicode's normal form NFKC")
    if "\\" in adapter_id:
        raise_invalid(adapter_id, "a backslash is not allowed")
    segments = adapter_id.split("/")
    for segment in segments:
        _check_segment(adapter_id, segment)
    return segments


def _check_segment(adapter_id: str, segment: str) -> None:
    if not segment:
        raise_invalid(adapter_id, "it must be a relative path without empty parts, such as `team/adapter`")
    if segment.startswith("."):
        raise_invalid(adapter_id, "`..` and names that begin with a dot are not allowed")
    if segment != segment.strip():
        raise_invalid(adapter_id, "a part begins or ends with a blank")
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        raise_invalid(adapter_id, f"a part is longer than {MAX_SEGMENT_BYTES} bytes")
