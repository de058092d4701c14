"""The authors' ``.pt`` files: arrays are read exactly, and nothing that a file names is run."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentguard.data.released import import_released, read_released
from latentguard.errors import PromptError


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def archive(path, content, compress=zipfile.ZIP_STORED):
    """A ``.pt`` file around any pickle."""
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("x/data.pkl", content)
    return path


def equal(tensor, array):
    return np.array_equal(tensor.numpy(), array)


class TestWhatTheAuthorsWrote:
    @pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", "<i8", "|i1", "|u1", "|b1"])
    def test_an_array_of_any_number_format(self, tmp_path, kind):
        array = (np.arange(24).reshape(2, 3, 4) % 7).astype(kind)
        found = read_released(saved(tmp_path / "qwen-dir-hf.pt", array))
        assert list(found) == ["qwen-dir-hf"]
        assert equal(found["qwen-dir-hf"], array)

    def test_an_array_in_the_order_of_fortran(self, tmp_path):
        array = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
        assert equal(read_released(saved(tmp_path / "a.pt", array))["a"], array)

    def test_arrays_in_dicts_and_lists(self, tmp_path):
        one, two = np.ones((2, 3), np.float16), np.zeros(4)
        content = {"hf": {"Fraud": one, "Malware": two}, "all": [one, (two,)]}
        found = read_released(saved(tmp_path / "a.pt", content))
        assert set(found) == {"Fraud", "Malware", "all.0", "all.1.0"}
        assert equal(found["Fraud"], one)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
    def test_a_tensor(self, tmp_path, dtype):
        tensor = torch.arange(12).reshape(3, 4).to(dtype)
        found = read_released(saved(tmp_path / "a.pt", tensor))["a"]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)

    def test_a_view_of_a_larger_tensor_is_the_view_alone(self, tmp_path):
        """A position out of seven: the file holds them all, with strides."""
        whole = torch.arange(2 * 7 * 3, dtype=torch.float32).reshape(2, 7, 3)
        found = read_released(saved(tmp_path / "a.pt", whole[:, 5]))["a"]
        assert torch.equal(found, whole[:, 5])
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == 2 * 3 * 4

    def test_an_empty_array(self, tmp_path):
        assert read_released(saved(tmp_path / "a.pt", np.empty((0, 3))))["a"].shape == (0, 3)

    def test_a_file_of_numpy_1(self, tmp_path):
        """The module was called numpy.core then; what is written today names numpy._core."""
        array = np.arange(6, dtype=np.float16).reshape(2, 3)
        text = pickle.dumps(array, protocol=2).replace(b"numpy._core", b"numpy.core")
        assert equal(read_released(archive(tmp_path / "a.pt", text))["a"], array)


class Runs:
    """Runs something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("function", "arguments"),
        [
            (eval, ("open('{here}/ran', 'w')",)),
            (exec, ("open('{here}/ran', 'w')",)),
            (open, ("{here}/ran", "w")),
            (__import__, ("os",)),
            (getattr, ("a", "upper")),
            (torch.load, ("{here}/other.pt",)),
            (np.load, ("{here}/other.npy",)),
            (np.fromfile, ("{here}/other",)),
            (io.open, ("{here}/ran", "w")),
        ],
    )
    def test_nothing_that_a_file_names_is_run(self, tmp_path, function, arguments):
        arguments = [a.replace("{here}", str(tmp_path)) for a in arguments]
        path = saved(tmp_path / "bad.pt", {"a": np.ones(3), "b": Runs(function, *arguments)})
        with pytest.raises(PromptError, match="which is not allowed"):
            read_released(path)
        assert [file.name for file in tmp_path.iterdir()] == ["bad.pt"]

    def test_by_the_names_of_a_shell(self, tmp_path):
        """Hand-written, as an attacker would: no import, no class."""
        path = archive(tmp_path / "bad.pt", b"cos\nsystem\n(S'touch ran'\ntR.")
        with pytest.raises(PromptError, match=r"it names 'os\.system', which is not allowed"):
            read_released(path)

    @pytest.mark.parametrize("name", ["numpy.core.multiarray\nfromfile", "numpy\nload"])
    def test_other_functions_of_an_allowed_module(self, tmp_path, name):
        path = archive(tmp_path / "bad.pt", f"c{name}\n(S'x'\ntR.".encode())
        with pytest.raises(PromptError, match="which is not allowed"):
            read_released(path)

    @pytest.mark.parametrize(
        "state", [b"(dS'a'\nI1\ns", b"N(dS'__defaults__'\nNs\x86"], ids=["attribute", "slot"]
    )
    def test_an_allowed_function_cannot_be_changed(self, tmp_path, state):
        path = archive(tmp_path / "bad.pt", b"c_codecs\nencode\n" + state + b"b.")
        with pytest.raises(PromptError, match="it changes a function"):
            read_released(path)

    @pytest.mark.parametrize("name", ["numpy\nndarray", "numpy\ndtype", "collections\nOrderedDict"])
    def test_an_allowed_class_cannot_be_changed(self, tmp_path, name):
        path = archive(tmp_path / "bad.pt", f"c{name}\n(dS'__init__'\nI1\nsb.".encode())
        with pytest.raises(PromptError, match="cannot be read safely"):
            read_released(path)

    def test_a_list_that_holds_itself(self, tmp_path):
        with pytest.raises(PromptError, match="cannot be read safely"):
            read_released(archive(tmp_path / "bad.pt", b"]q\x00h\x00a."))

    def test_an_array_of_objects(self, tmp_path):
        path = saved(tmp_path / "bad.pt", np.array([dict(a=1), None], dtype=object))
        with pytest.raises(PromptError, match="arrays of 'O8' are not numbers"):
            read_released(path)

    def test_a_view_beyond_its_storage(self, tmp_path):
        path = saved(tmp_path / "a.pt", torch.zeros(4))
        content = {}
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                content[name] = file.read(name)
        (name,) = [n for n in content if n.endswith("data.pkl")]
        content[name] = content[name].replace(
            b"K\x04\x85", b"M" + struct.pack("<H", 4096) + b"\x85"
        )
        with zipfile.ZipFile(path, "w") as file:
            for member, raw in content.items():
                file.writestr(member, raw)
        with pytest.raises(PromptError, match="cannot be read safely"):
            read_released(path)

    def test_a_shape_that_the_bytes_do_not_fill(self, tmp_path):
        text = pickle.dumps(np.zeros(4, np.float32), protocol=2)
        text = text.replace(b"K\x04\x85", b"J" + struct.pack("<i", 1 << 30) + b"\x85")
        with pytest.raises(PromptError, match="not plain little-endian numbers"):
            read_released(archive(tmp_path / "bad.pt", text))

    def test_a_pickle_that_is_compressed(self, tmp_path):
        path = archive(tmp_path / "bad.pt", b"N." + b" " * 100_000, zipfile.ZIP_DEFLATED)
        with pytest.raises(PromptError, match="is compressed"):
            read_released(path)

    @pytest.mark.parametrize("text", [b"", b".", b"junk", b"(lp0\n", b"\x80\x02K\x01."])
    def test_a_damaged_pickle(self, tmp_path, text):
        with pytest.raises(PromptError):
            read_released(archive(tmp_path / "bad.pt", text))

    def test_what_is_no_archive(self, tmp_path):
        (tmp_path / "a.pt").write_bytes(pickle.dumps(np.ones(3)))
        with pytest.raises(PromptError, match="not a zip archive"):
            read_released(tmp_path / "a.pt")
        with pytest.raises(PromptError, match="cannot be read: No such file"):
            read_released(tmp_path / "none.pt")

    def test_an_archive_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
            file.writestr("readme.txt", "hello")
        with pytest.raises(PromptError, match=r"no 'data\.pkl'"):
            read_released(tmp_path / "a.pt")

    def test_a_file_without_arrays(self, tmp_path):
        with pytest.raises(PromptError, match="holds no arrays"):
            read_released(saved(tmp_path / "a.pt", {}))
        with pytest.raises(PromptError, match="holds a str at 'name'"):
            read_released(saved(tmp_path / "b.pt", {"name": "x"}))


class TestImport:
    def test_several_files_become_one(self, tmp_path):
        one, two = np.ones((29, 8), np.float16), np.zeros((33, 4), np.float16)
        files = [saved(tmp_path / "qwen-dir-hf.pt", one), saved(tmp_path / "llama.pt", two)]
        out = tmp_path / "released.safetensors"
        shapes = import_released(files, out)
        assert shapes == {"qwen-dir-hf": (29, 8), "llama": (33, 4)}
        found = load_file(out)
        assert equal(found["qwen-dir-hf"], one)
        with safe_open(out, framework="pt") as file:
            assert set(file.metadata()) == {"sha256 of qwen-dir-hf.pt", "sha256 of llama.pt"}

    def test_one_name_twice(self, tmp_path):
        files = [saved(tmp_path / name, {"v": np.ones(3)}) for name in ("a.pt", "b.pt")]
        with pytest.raises(PromptError, match=r"b\.pt holds 'v', which another file holds too"):
            import_released(files, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
