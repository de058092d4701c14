"""The authors' released ``.pt`` files, read without running anything that is written in them.

``torch.save`` writes a zip archive with a pickle in it, and unpickling runs what the file names.
Here the pickle may name only what an array, a tensor and the containers around them are made of,
and each of these names stands for a function of this module: no code of numpy, torch or the file
is called by it. This is the one module of the package that imports ``pickle``.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentguard.errors import PromptError
from latentguard.files import atomic_path

DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}
"""numpy's names of number formats, byte order apart."""

STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""torch's names of storages."""


def read_released(path: str | Path) -> dict[str, Tensor]:
    """Read the arrays and tensors of a ``.pt`` file.

    Returns:
        Each array, contiguous, by its place in the file: the file's name for one array, keys and
        indices joined by dots for those in dicts and lists.

    Raises:
        PromptError: if the file is not what ``torch.save`` writes, or holds something other than
            arrays of numbers; nothing of it is run.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Unpickler(archive, path).load()
        arrays = dict(_arrays_in(content, path.stem, path))
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}.") from None
    except zipfile.BadZipFile:
        raise PromptError(f"{path} is not a zip archive, as 'torch.save' writes it.") from None
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise PromptError(f"{path} cannot be read safely: {error}.") from None
    if not arrays:
        raise PromptError(f"{path} holds no arrays.")
    return arrays


def import_released(files: Sequence[str | Path], out: str | Path) -> dict[str, tuple[int, ...]]:
    """Write the arrays of ``.pt`` files into one safetensors file.

    Returns:
        The shape of each array, by its name.

    Raises:
        PromptError: as ``read_released``, and if two arrays have one name.
    """
    from safetensors.torch import save_file

    arrays: dict[str, Tensor] = {}
    sources = {}
    for file in files:
        for name, array in read_released(file).items():
            if name in arrays:
                raise PromptError(f"{file} holds '{name}', which another file holds too.")
            arrays[name] = array
        sources[Path(file).name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    digests = {f"sha256 of {name}": digest for name, digest in sources.items()}
    with atomic_path(out) as partial:
        save_file(arrays, partial, metadata=digests)
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _arrays_in(value: Any, name: str, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The arrays in nested dicts, lists and tuples."""
    if isinstance(value, _Array):
        value = value.tensor
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _arrays_in(item, str(key), path)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _arrays_in(item, f"{name}.{index}", path)
    else:
        raise PromptError(
            f"{path} holds a {type(value).__name__} at '{name}'; expected arrays of numbers, in "
            "dicts or lists."
        )


@dataclass(frozen=True)
class _Storage:
    """The numbers of a tensor, one after the other."""

    values: Tensor


class _Dtype:
    """Stands for ``numpy.dtype``: a number format."""

    def __init__(self, code: str, align: object = False, copy: object = True) -> None:
        if code not in DTYPES:
            raise pickle.UnpicklingError(f"arrays of '{code}' are not numbers")
        self.dtype = DTYPES[code]
        self.swapped = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.swapped = state[1] == ">"


class _Array:
    """Stands for ``numpy.ndarray``: made empty, then given its shape and numbers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        size = math.prod(shape) * dtype.dtype.itemsize
        if dtype.swapped or not isinstance(raw, bytes) or len(raw) != size:
            raise pickle.UnpicklingError("an array is not plain little-endian numbers")
        flat = _from_bytes(raw, dtype.dtype)
        if is_fortran:
            axes = tuple(range(len(shape)))[::-1]
            self.tensor = flat.reshape(shape[::-1]).permute(axes).contiguous()
        else:
            self.tensor = flat.reshape(shape)


class _Sealed:
    """A function that a file may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    """Stands for numpy's ``_reconstruct``."""
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, by which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text is encoded as '{encoding}'")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands for ``bytes``, by which protocol 2 writes an empty one."""
    return b""


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> Tensor:
    """Stands for torch's ``_rebuild_tensor_v2``; torch checks that the view lies in the storage."""
    return torch.as_strided(storage.values, size, stride, offset).contiguous().clone()


def _from_bytes(raw: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


_DAMAGE = (EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError)
"""What a damaged or hostile pickle makes of the functions above."""

ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Sealed(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Sealed(_reconstruct),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("__builtin__", "bytes"): _Sealed(_no_bytes),
    ("_codecs", "encode"): _Sealed(_encode),
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Sealed(_rebuild_tensor),
}
"""What a file may name, and what it stands for here."""


class _Unpickler(pickle.Unpickler):
    """Reads the pickle of an archive; every name that is not allowed is an error."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PromptError(f"{path} has no 'data.pkl', as 'torch.save' writes it.")
        self._archive = archive
        self._folder = pickles[0].removesuffix("data.pkl")
        # An open member would keep the file open for as long as an error holds this object.
        super().__init__(io.BytesIO(archive.read(self._stored(pickles[0]))))

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
            UnpicklingError: if it is not allowed.
        """
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names '{module}.{name}', which is not allowed")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of a tensor, which lies beside the pickle."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError("it refers to something other than a storage")
        raw = self._archive.read(self._stored(f"{self._folder}data/{key}"))
        if len(raw) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} is not {count} numbers")
        return _Storage(_from_bytes(raw, dtype))

    def _stored(self, name: str) -> str:
        """The name of a member that is not compressed: ``torch.save`` compresses nothing."""
        if self._archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"'{name}' is compressed")
        return name
