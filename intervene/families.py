"""Where each model family keeps its components: the names other modules use.

The data is in `family_table`, finding the blocks in `locate`, turning a site into a module in `resolve`.
`check_family`, which runs the model, is in `intervene.check`: nothing below `run` may run a forward pass.
"""

from __future__ import annotations

from intervene.columns import features
from intervene.family_table import FAMILIES, Family, Refusal, register_family
from intervene.locate import Located, fingerprint, locate, located_once, unwrap
from intervene.resolve import Tap, components_of, resolve

__all__ = [
    "FAMILIES",
    "Family",
    "Located",
    "Refusal",
    "Tap",
    "components_of",
    "features",
    "fingerprint",
    "locate",
    "located_once",
    "register_family",
    "resolve",
    "unwrap",
]
