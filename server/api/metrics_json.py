"""LoRAX's JSON form of /metrics: `{name: {"type", "data": [{"key", "value"}]}}`.

A pure function of the text form, so that both always say the same. A histogram's entries are its "sum" and "count" (no buckets, as in
LoRAX); a series with labels has `name{labels}` as its key, one without has "".
"""

import re
from typing import Any

_TYPE = re.compile(r"^# TYPE (\S+) (\S+)$")
_SAMPLE = re.compile(r"^([^\s{]+)(\{.*\})? (\S+)$")


def as_json(text: bytes) -> dict[str, Any]:
    """The families of a text exposition, in its order. Values that JSON has no number for (NaN, infinities) are left out."""
    families: dict[str, Any] = {}
    name, kind = "", ""
    for line in text.decode().splitlines():
        if (declared := _TYPE.match(line)) is not None:
            name, kind = declared[1], declared[2]
            families[name] = {"type": kind, "data": []}
        elif name and (sample := _SAMPLE.match(line)) is not None and sample[1].startswith(name):
            suffix, labels, value = sample[1][len(name) :], sample[2] or "", float(sample[3])
            if suffix == "_bucket" or value - value != 0:
                continue
            part = suffix.removeprefix("_") if kind in ("histogram", "summary") else ""
            key = f"{sample[1]}{labels}" if labels else part
            families[name]["data"].append({"key": key, "value": value})
    return families
