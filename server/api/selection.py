"""What a request says of an adapter, and what it gets for it. Plain data; the routes make the one, api.adapters answers with the other."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from server.api.names import shown
from server.api.text.tokenizer import Tokenizer
from server.types import AdapterRef


@dataclass(frozen=True)
class Merge:
    """LoRAX's merged_adapters, already checked."""

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: str = "linear"
    density: float = 0.0
    majority_sign_method: str = "total"


# Where a request found its adapter: in memory, on this server's disk, or nowhere, so that it was fetched from its source and packed.
AdapterTier = Literal["device", "host", "disk", "source"]
NameKey = tuple[str, str, Merge | None]  # source, id, and for several merged ones (source, "", merge)


@dataclass(frozen=True)
class AdapterSelection:
    """What a request says: one adapter, or several merged. `api_token` is the caller's own, for sources that know callers."""

    source: str
    adapter_id: str = ""
    merge: Merge | None = None
    api_token: str | None = None
    given: tuple[str, ...] = ()  # the ids as the caller wrote them, where that is not how they are kept

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids as they are kept: in the source's one spelling, of a tenant's own names with the tenant (api.names)."""
        return self.merge.ids if self.merge is not None else (self.adapter_id,)

    @property
    def shown_ids(self) -> tuple[str, ...]:
        """The ids for the caller and its messages: as it wrote them, without the tenant that they are kept under."""
        return self.given or tuple(map(shown, self.ids))

    @property
    def name_key(self) -> NameKey:
        """What it names, whoever asks."""
        return (self.source, self.adapter_id, self.merge)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for requests that must get the same answer."""
        token = hashlib.sha256((self.api_token or "").encode("utf-8", errors="surrogatepass")).digest()
        return (self.source, self.adapter_id, self.merge, token, self.given)


@dataclass(frozen=True)
class ResolvedAdapter:
    """An adapter that is ready on local disk. `tokenizer` is the base's own unless the adapter brings one or a chat template."""

    ref: AdapterRef
    tokenizer: Tokenizer
    own_template: bool  # the chat template is a stranger's
    rank: int = 0
    base_name: str | None = None  # the model that its config names
    tier: AdapterTier = "disk"  # where this request found it
