"""Names of models -> directories with their files. Everything that is imported from transformers comes through here."""

import errno
import os
from pathlib import Path

from plumbing.launch import ROOT, UserError


def __getattr__(name: str):
    """transformers, or a class of it, imported at its first use: that takes two seconds, and a sender needs none."""
    if name not in (
        "transformers", "AutoModelForCausalLM", "AutoTokenizer", "DynamicCache", "GenerationConfig",
        "GradientCheckpointingLayer",
    ):  # fmt: skip
        raise AttributeError(name)
    import transformers

    # transformers looks for a package that is also called kernels, and would find this project's folder
    nothing = transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False
    transformers.utils.is_kernels_available = nothing
    if name == "GradientCheckpointingLayer":
        return transformers.modeling_layers.GradientCheckpointingLayer
    return transformers if name == "transformers" else getattr(transformers, name)


# alias -> hub id, or the directory of an embedded reader
MODELS = {
    "tiny": "tiny/tiny-llama",
    "tiny-llama": "tiny/tiny-llama",
    "tiny-qwen": "tiny/tiny-qwen",
    "llama-7b": "huggyllama/llama-7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def find_model(name: str) -> Path:
    """The local directory of an alias, a hub id (downloaded into the hub's cache) or a directory.

    Raises UserError for an unknown name and for a repository that is unreachable or gated.
    """
    known = ", ".join(MODELS)
    target = MODELS.get(name, name)
    if name in MODELS and target.startswith("tiny/"):
        return ROOT / target
    local = Path(os.path.expanduser(target))  # Path.expanduser() raises for a user who is not there
    if local.is_dir():
        return local
    if target.startswith((".", "/", "~")) or target.count("/") != 1 or "\\" in target or local.exists():
        raise UserError(f"--model {name}: no such alias, hub id or directory; the aliases are {known}")
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    address = f"https://huggingface.co/{target}"
    try:
        wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "*.jinja"]
        return Path(snapshot_download(target, allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"]))
    except hub_errors.GatedRepoError:
        problem = f"{address} is gated: ask for access there, then set HF_TOKEN, or give a local directory"
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        problem = f"{address} does not exist or is private (set HF_TOKEN); the aliases are {known}"
    except Exception as error:  # the hub's client also raises errors of its HTTP library, and has changed that library
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        problem = (
            f"cannot reach {address} and it is not in the cache ({type(error).__name__}); go online once, or give a "
            "local directory with config.json, *.safetensors and tokenizer.json"
        )
    raise UserError(f"--model {name}: {problem}")
