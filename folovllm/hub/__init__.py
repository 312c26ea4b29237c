"""Where models come from: an alias, a local HuggingFace folder, or a HuggingFace id (milestone M0).

The rest of FoloVLLM calls `find_model(name) -> Path`, and `folovllm pull` calls `pull(name)`. torch, transformers, gguf
and huggingface_hub are imported only inside the functions that need them, so finding a model that is already there
takes milliseconds. vLLM's counterpart is vllm/model_executor/model_loader/weight_utils.py. Left out: ModelScope, S3,
revisions, and every weight format but safetensors (a pickle can run code, so none is ever opened).
"""

from folovllm.hub.aliases import ALIASES, Alias, default_download_dir, list_aliases
from folovllm.hub.errors import HashMismatchError, HubError, ModelFolderError, ModelNotFoundError, PullError
from folovllm.hub.fetch import pull, verify_pulled
from folovllm.hub.find import find_model, find_tokenizer
from folovllm.hub.folder import check_model_folder

__all__ = [
    "ALIASES",
    "Alias",
    "HashMismatchError",
    "HubError",
    "ModelFolderError",
    "ModelNotFoundError",
    "PullError",
    "check_model_folder",
    "default_download_dir",
    "find_model",
    "find_tokenizer",
    "list_aliases",
    "pull",
    "verify_pulled",
]
