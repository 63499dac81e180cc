"""Reading PyTorch's distributed checkpoints without running what a pickle may ask for."""

import enum
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

# The classes in PyTorch's index of a checkpoint of tensors.
_METADATA = "torch.distributed.checkpoint.metadata"
KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}
PATHS = {"PosixPath", "WindowsPath"}


class PlainReader(dcp.FileSystemReader):
    """PyTorch's reader, whose index is unpickled from known classes only; tensors are ``weights_only``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = IndexUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class IndexUnpickler(pickle.Unpickler):
    """An unpickler of such indices; raises ``UnpicklingError`` for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        a_path = module.split(".")[0] == "pathlib" and name in PATHS
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (a_path or a_dtype or (module, name) in KNOWN):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    """The member of an enumeration. The first releases of Python 3.11 pickled it as a ``getattr``."""
    if isinstance(kind, enum.EnumType) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) has no place in the index of a checkpoint")
