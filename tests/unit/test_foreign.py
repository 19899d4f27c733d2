"""Files that others wrote are read as torch itself would load them, and nothing in them is run."""

import collections
import functools
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import detrojan
from detrojan import foreign
from detrojan.foreign import pickles
from detrojan.foreign.values import Named, Opaque
from tests.command import exit_code

SOURCES = Path(detrojan.__file__).parent


class Small(nn.Module):
    """A network that no list knows, with a buffer that is not saved and an attribute that is none."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.tail = nn.Sequential(nn.GELU(), nn.Linear(2, 4))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.attribute = torch.ones(3)

    def forward(self, images):
        return self.tail(self.bn(self.conv(images)).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def state(small):
    return small.state_dict()


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Stand in a folder where planted files would leave a file, and see afterwards that none has."""
    folder = tmp_path / "canary"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


def zipped(path, entries, compression=zipfile.ZIP_STORED, root="archive"):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"{root}/{name}", content)
    return path


def planted(path, program, storages=(b"\0" * 4,)):
    """Write an archive of torch whose pickle is ``program``."""
    entries = {f"data/{key}": content for key, content in enumerate(storages)}
    return zipped(path, {"data.pkl": program, "byteorder": b"little", **entries})


def equal(tensors, expected):
    assert list(tensors) == list(expected)
    torch.testing.assert_close(tensors, dict(expected), rtol=0, atol=0)
    assert all(tensors[name].dtype == value.dtype for name, value in expected.items())


def refusal(path, key=None):
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as refused:
        foreign.read(path, key)
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"{path}: ")


# --- kinds of files --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zip_file", [True, False])
def test_a_state_dict_is_read_as_torch_loads_it(tmp_path, state, dtype, zip_file):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    torch.save(state, tmp_path / "state.pth", _use_new_zipfile_serialization=zip_file)
    checkpoint = foreign.read(tmp_path / "state.pth")
    equal(checkpoint.tensors, state)
    assert checkpoint.kind == ("pickled archive of torch" if zip_file else "older file of torch")
    assert checkpoint.place == ()


def test_odd_tensors_are_read_as_torch_loads_them(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    odd = {
        "turned": base.t(),
        "strided": base[:, 1:3],
        "empty": torch.empty(0, 3),
        "one": torch.tensor(3),
        "truth": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "parameter": nn.Parameter(base),
    }
    torch.save(odd, tmp_path / "odd.pt")
    checkpoint = foreign.read(tmp_path / "odd.pt")
    equal(checkpoint.tensors, {name: value.detach() for name, value in odd.items()})


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_whole_module_is_read_without_its_class(tmp_path, small, protocol):
    torch.save(nn.DataParallel(small), tmp_path / "whole.pt", pickle_protocol=protocol)
    checkpoint = foreign.read(tmp_path / "whole.pt")
    equal(checkpoint.tensors, {f"module.{name}": value for name, value in small.state_dict().items()})
    assert checkpoint.module == "torch.nn.parallel.data_parallel.DataParallel"
    assert f"{__name__}.Small" in checkpoint.names


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_read_without_its_code(tmp_path, small):
    torch.jit.script(small).save(tmp_path / "script.pt")
    checkpoint = foreign.read(tmp_path / "script.pt")
    assert checkpoint.kind == "TorchScript"
    tensors = dict(checkpoint.tensors)
    assert torch.equal(tensors.pop("hidden"), torch.ones(2))  # it keeps no note that these are not saved
    assert torch.equal(tensors.pop("attribute"), torch.ones(3))
    equal(tensors, small.state_dict())


def test_the_weights_of_an_exported_program_are_read(tmp_path, state):
    """Of the form that torch 2.13 writes: to export takes seconds."""
    listed, entries = {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        entries[f"data/weights/weight_{number}"] = tensor.numpy().tobytes()
        meta = {
            "dtype": {torch.float32: 7, torch.int64: 5}[tensor.dtype],
            "sizes": [{"as_int": size} for size in tensor.shape],
            "strides": [{"as_int": stride} for stride in tensor.stride()],
            "storage_offset": {"as_int": 0},
        }
        listed[name] = {"path_name": f"weight_{number}", "use_pickle": False, "tensor_meta": meta}

    def write(changes=()):
        config = json.dumps({"config": listed | dict(changes)})
        weights = {"data/weights/model_weights_config.json": config}
        return zipped(tmp_path / "net.pt2", {"archive_format": b"pt2", **entries, **weights})

    equal(foreign.read(write()).tensors, state)
    first = listed["conv.weight"]
    for part, text in [
        ({"use_pickle": True}, "pickled"),
        ({"path_name": "../../secret"}, "another form"),
        ({"tensor_meta": first["tensor_meta"] | {"dtype": 9}}, "only float16"),
        ({"tensor_meta": first["tensor_meta"] | {"sizes": [{"as_int": 7}] * 4}}, "beyond its storage"),
    ]:
        assert text in refusal(write({"conv.weight": first | part}))
    assert "leave out --key" in refusal(write(), "model")


def test_safetensors_say_what_timm_wrote_beside_them(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    equal({name: foreign.read(tmp_path).tensors[name] for name in state}, state)
    assert foreign.read(tmp_path).known == foreign.Known()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "label_names": ["a", "b", "c", "d"],
        "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.5, 0.5],
            "input_size": [3, 224, 224],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "first_conv": "patch_embed.proj",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = foreign.read(tmp_path / "model.safetensors").known
    assert (known.network, known.num_classes, known.class_names) == (
        "timm:vit_tiny_patch16_224",
        4,
        ("a", "b", "c", "d"),
    )
    assert (known.mean, known.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert (known.image_size, known.interpolation, known.crop_share) == (224, "bicubic", 0.9)
    for wrong, text in [
        ({"auto_map": {}}, "runs code of others"),
        ({"num_classes": -1}, "num_classes"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        assert text in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "no JSON" in refusal(tmp_path)


def test_safetensors_say_what_hugging_face_wrote_beside_them(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "vit", "id2label": {"1": "dog", "0": "cat"}, "image_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert foreign.read(tmp_path).known == foreign.Known(
        network="transformers:vit",
        num_classes=2,
        class_names=("cat", "dog"),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        image_size=32,
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "cat", "2": "dog"}}))
    assert "from 0 to 1" in refusal(tmp_path)


# --- where the state dict lies ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "clsmodel", "netC"])
def test_a_state_dict_is_found_where_training_code_puts_it(tmp_path, state, key):
    others = {"modelG": {"w": torch.ones(2)}, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(1)}}}}
    torch.save({key: state, **others}, tmp_path / "model.pt")
    checkpoint = foreign.read(tmp_path / "model.pt")
    equal(checkpoint.tensors, state)
    assert checkpoint.place == (key,)
    assert checkpoint.beside["epoch"] == 3
    assert set(checkpoint.beside) == set(others)


def test_several_state_dicts_are_asked_about(tmp_path, state):
    ema = {name: value + 1 for name, value in state.items()}
    path = tmp_path / "model.pt"
    torch.save({"model": state, "net": ema, "epoch": 3}, path)
    assert refusal(path) == "it has state dicts under model, net: choose one with --key"
    equal(foreign.read(path, "net").tensors, ema)
    assert "no state dict under 'epoch'" in refusal(path, "epoch")
    torch.save({"ema": state}, path)
    assert "under ema: choose" in refusal(path)
    torch.save({"epoch": 3}, path)
    assert "it has epoch" in refusal(path)
    torch.save([state], path)
    assert "no state dict" in refusal(path)
    torch.save({"model": collections.OrderedDict()}, path)
    assert "no state dict" in refusal(path)


@pytest.mark.parametrize("zip_file", [True, False])
def test_results_of_backdoorbench_are_read(tmp_path, state, zip_file):
    """Both of its files: with data sets that lie on disk, and after a defense."""
    defended = {"model_name": "preactresnet18", "num_classes": 4, "model": state}
    index = np.arange(6).reshape(2, 3)
    attacked = defended | {
        "data_path": "./data",
        "img_size": [32, 32, 3],
        "clean_data": "cifar10",
        "bd_test": {
            "original_index_array": index,
            "turned": np.asfortranarray(index),
            "poison_indicator": np.array([True, False]),
            "ratio": np.float64(0.25),
            "names": np.array(["no", "numbers"]),
            "container": {"data_dict": {np.int64(3): {"path": "3.png", "other": (0, 1)}}},
        },
    }
    torch.save(defended, tmp_path / "defense_result.pt", _use_new_zipfile_serialization=zip_file)
    torch.save(attacked, tmp_path / "attack_result.pt", _use_new_zipfile_serialization=zip_file)
    checkpoint = foreign.read(tmp_path / "defense_result.pt")
    equal(checkpoint.tensors, state)
    assert checkpoint.known == foreign.Known(network="preactresnet18", num_classes=4)
    if not zip_file:  # torch calls its arrays unsafe
        assert "with more than weights" in refusal(tmp_path / "attack_result.pt")
        return
    checkpoint = foreign.read(tmp_path / "attack_result.pt")
    equal(checkpoint.tensors, state)
    assert checkpoint.known.image_size == 32
    test = checkpoint.beside["bd_test"]
    for name in ("original_index_array", "turned", "poison_indicator"):
        np.testing.assert_array_equal(test[name], attacked["bd_test"][name])
        assert test[name].dtype == attacked["bd_test"][name].dtype
    assert test["ratio"] == 0.25
    assert isinstance(test["names"], Opaque)
    assert test["container"] == attacked["bd_test"]["container"]


def test_results_of_backdoorbench_with_images_in_memory_are_read(tmp_path, state):
    images = {np.int64(3): {"bd_img": Image.new("RGB", (2, 2), "red")}}
    torch.save({"model": state, "bd_test": images}, tmp_path / "attack_result.pt")
    checkpoint = foreign.read(tmp_path / "attack_result.pt")
    equal(checkpoint.tensors, state)
    assert checkpoint.beside["bd_test"][3]["bd_img"].what == Named("PIL.Image", "Image")


def test_arrays_of_numpy_1_are_read_too(tmp_path, state):
    path = tmp_path / "model.pt"
    torch.save({"model": state, "array": np.arange(3)}, path)
    with zipfile.ZipFile(path) as file:
        content = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    content["data.pkl"] = content["data.pkl"].replace(b"numpy._core.", b"numpy.core.")
    zipped(path, content)
    np.testing.assert_array_equal(foreign.read(path).beside["array"], np.arange(3))


# --- planted files ---------------------------------------------------------------------------------


class Runs:
    """What a pickle makes by calling ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Sets(collections.OrderedDict):
    def __reduce__(self):
        return collections.OrderedDict, (), {"__class__": Sets}


TOUCH = "touch canary"
PLANTED = {
    "os.system": (pickle.dumps(Runs(os.system, TOUCH), 2), "would run posix.system if"),
    "eval": (pickle.dumps(Runs(eval, "open('canary', 'w')"), 4), "would run builtins.eval if"),
    "getattr": (pickle.dumps(Runs(getattr, Runs(__import__, "os"), "system"), 2), "would run builtins."),
    "torch's own loader": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\n(B\x01\x00\x00\x00xtR.",
        "would run torch.storage._load_from_bytes if",
    ),
    "Popen by NEWOBJ": (
        b"\x80\x02csubprocess\nPopen\nX\x0c\x00\x00\x00touch canary\x85\x81.",
        "would run subprocess.Popen if",
    ),
    "os.system by INST": (b"(X\x0c\x00\x00\x00touch canaryios\nsystem\n.", "would run os.system if"),
    "os.system by OBJ": (b"(cos\nsystem\nX\x0c\x00\x00\x00touch canaryo.", "would run os.system if"),
    "a dotted name": (
        b"\x80\x04\x8c\x11torchvision.utils\x8c\x09os.system\x93\x8c\x0ctouch canary\x85R.",
        "would run torchvision.utils.os.system if",
    ),
    "a method of OrderedDict": (
        b"\x80\x04\x8c\x0bcollections\x8c\x1dOrderedDict.fromkeys.__func__\x93.",
        "would run collections.OrderedDict.fromkeys.__func__ if",
    ),
    "a function of torchvision": (
        b"\x80\x02ctorchvision.datasets.utils\ndownload_url\n)R.",
        "would run torchvision.datasets.utils.download_url if",
    ),
    "EXT1": (b"\x80\x02\x82\x01)R.", "instruction EXT1"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00)R.", "instruction EXT4"),
    "a state with a class": (pickle.dumps(Sets(), 2), "sets __class__"),
    "slots with a class": (
        b"\x80\x02ccollections\nOrderedDict\n)RN}X\x09\x00\x00\x00__class__NsX\x01\x00\x00\x00xNs\x86b.",
        "sets __class__",
    ),
    "a state for a name": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xNsb.", "has none"),
    "attributes of a list": (b"\x80\x02]}b.", "has none"),
    "a path as storage": (
        b"\x80\x04(\x8c\x07storagectorch\nFloatStorage\n\x8c\x0e../../password\x8c\x03cpuK\x01tQ.",
        "should be a number",
    ),
    "another persistent id": (b"\x80\x02X\x02\x00\x00\x00idQ.", "other than a storage"),
    "a persistent id as text": (b"Pid\n.", "instruction PERSID"),
    "a call of text": (b"\x80\x02X\x01\x00\x00\x00x)R.", "calls what is no name"),
    "a call of an object": (b"\x80\x02cfunctools\npartial\n)R)R.", "calls what is no name"),
    "keys that take years to hash": (b"\x80\x02})" + b"2\x86" * 200 + b"Ns.", "neither text nor numbers"),
    "no end": (b"\x80\x02}", "before seeing STOP"),
    "an empty stack": (b"\x80\x020.", "damaged"),
    "nothing kept": (b"\x80\x02h\x07.", "damaged"),
    "a number of any length": (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "4300"),
    "more bytes than there are": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "expected"),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.usefixtures("canary")
def test_a_planted_pickle_is_refused_and_leaves_no_trace(tmp_path, name):
    program, said = PLANTED[name]
    assert said in refusal(planted(tmp_path / "planted.pt", program))


@pytest.mark.parametrize("what", ["beside", "module", "older"])
@pytest.mark.usefixtures("canary")
def test_what_is_planted_in_a_good_file_is_refused(tmp_path, small, what):
    path = tmp_path / "planted.pt"
    if what == "module":
        small.planted = Runs(os.system, TOUCH)
        torch.save(small, path)
    else:
        planted = {"model": small.state_dict(), "x": Runs(os.system, TOUCH)}
        torch.save(planted, path, _use_new_zipfile_serialization=what == "beside")
    assert refusal(path) == "this file would run posix.system if it were loaded by torch.load: not imported"
    # The same file does run when it is loaded.
    torch.load(path, weights_only=False)
    Path("canary").unlink()


def test_an_own_class_is_benign_as_a_module_alone(tmp_path, small):
    path = tmp_path / "whole.pt"
    torch.save(small, path)
    assert foreign.read(path).module == f"{__name__}.Small"
    small.other = Runs(Small)  # called, as no module is
    torch.save(small, path)
    assert f"would run {__name__}.Small" in refusal(path)
    small.other = functools.partial(exit_code)  # named only
    torch.save(small, path)
    assert "would run tests.command.exit_code" in refusal(path)


def tensor_program(shape, strides, offset=0, length=1, kind=b"Float", key=b"0"):
    """Return a pickle of {"w": a tensor} whose storage has so many numbers."""

    def numbers(values):
        longs = [b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values]
        return b"(" + b"".join(longs) + b"t"

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\n%bStorage\nX\x01\x00\x00\x00%bX\x03\x00\x00\x00cpu" % (kind, key)
        + numbers([length])[1:-1]
        + b"tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers([offset])[1:-1]
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + numbers(shape) + numbers(strides) + b"\x89NtRs."


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (tensor_program([10**10], [0]), "beyond its storage"),  # one number, expanded
        (tensor_program([2], [1]), "beyond its storage"),
        (tensor_program([1], [1], offset=1), "beyond its storage"),
        (tensor_program([2, 2], [-1, 1]), "at least 0"),
        (tensor_program([1], [1, 1]), "strides"),
        (tensor_program([1] * 17, [1] * 17), "strides"),
        (tensor_program([1], [1], length=2), "should have 2 numbers"),  # more than the entry has
        (tensor_program([1], [1], length=2**62), "should have"),
        (tensor_program([1], [1], key=b"7"), "storage 7 is missing"),
        (tensor_program([1], [1], kind=b"ComplexFloat"), "ComplexFloatStorage: only float16"),
        (tensor_program([1], [1], kind=b"QInt8"), "QInt8Storage: only float16"),
    ],
)
def test_tensors_that_do_not_lie_in_their_storage_are_refused(tmp_path, program, said):
    assert said in refusal(planted(tmp_path / "planted.pt", program))


def test_the_program_of_these_tests_is_a_good_one(tmp_path):
    path = planted(tmp_path / "good.pt", tensor_program([1], [1]), [struct.pack("<f", 0.5)])
    equal(foreign.read(path).tensors, {"w": torch.tensor([0.5])})
    path = planted(tmp_path / "nan.pt", tensor_program([1], [1]), [struct.pack("<f", float("nan"))])
    assert "not finite" in refusal(path)


def test_an_expanded_tensor_of_an_older_file_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**10)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert "beyond its storage" in refusal(tmp_path / "x.pt")


def test_many_views_of_one_storage_are_refused(tmp_path):
    whole = torch.zeros(50_000)
    torch.save({f"w{number}": whole for number in range(100)}, tmp_path / "x.pt")
    assert "its tensors would take" in refusal(tmp_path / "x.pt")


def test_a_pickle_of_too_many_steps_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    assert "1,000 steps" in refusal(planted(tmp_path / "x.pt", b"\x80\x02" + b"]" * 2000 + b"."))


def test_modules_and_lists_that_share_each_other_end(tmp_path):
    """Each holds the one before twice: as a tree, 2¹⁰⁰ of them."""
    inner = nn.Sequential(nn.Linear(1, 1))
    for _ in range(60):
        inner = nn.Sequential(inner, inner)
    torch.save(inner, tmp_path / "x.pt")
    assert "without end" in refusal(tmp_path / "x.pt")
    shared, endless = [], []
    for _ in range(110):
        shared = [shared, shared]
    endless.append(endless)
    for beside in (shared, endless):
        torch.save({"model": {"w": torch.ones(1)}, "x": beside}, tmp_path / "x.pt")
        assert "no end" in refusal(tmp_path / "x.pt")


def test_zip_files_that_torch_would_not_write_are_refused(tmp_path):
    path, good = tmp_path / "x.pt", {"data.pkl": tensor_program([1], [1]), "data/0": b"\0" * 4}
    assert "is compressed" in refusal(zipped(path, good | {"data/1": b"\0" * 10**6}, zipfile.ZIP_DEFLATED))
    assert "big-endian" in refusal(zipped(path, good | {"byteorder": b"big"}))
    assert "points out of it" in refusal(zipped(path, good | {"../../data/1": b""}))
    assert "without data.pkl" in refusal(zipped(path, {"data/0": b""}))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("one/data.pkl", b"")
        file.writestr("two/data.pkl", b"")
    assert "several folders" in refusal(path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("two/data.pkl", b"")
    assert "one name" in refusal(path)
    with zipfile.ZipFile(zipped(path, good), "a") as file:
        other = file.getinfo("archive/data/0")
        file.filelist.append(again := zipfile.ZipInfo("archive/data/1"))
        again.header_offset, again.file_size = other.header_offset, other.file_size
        again.compress_size, again.CRC = other.compress_size, other.CRC
        file._didModify = True
    assert "beyond its place" in refusal(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    assert refusal(path) == "no such file"
    path.write_bytes(b"nothing of the kind")
    assert "neither a file of torch nor safetensors" in refusal(path)
    path.write_bytes(b"")
    assert "neither" in refusal(path)
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("x"), io.BytesIO())
    assert "tar file" in refusal(path)
    (tmp_path / "x.onnx").write_bytes(b"\x80\x02")
    assert "ONNX" in refusal(tmp_path / "x.onnx")
    for header in (2**63 - 1, 40):
        (tmp_path / "x.safetensors").write_bytes(header.to_bytes(8, "little") + b'{"w": {}' + b" " * 40)
        assert refusal(tmp_path / "x.safetensors")
    places = {"a": [0, 4], "b": [2, 6]}
    entries = {name: {"dtype": "F32", "shape": [1], "data_offsets": place} for name, place in places.items()}
    overlap = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(len(overlap).to_bytes(8, "little") + overlap + b"\0" * 6)
    assert "damaged" in refusal(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "older", "safetensors", "whole"])
def test_flipped_bytes_are_refused_or_change_no_shape(tmp_path, small, kind):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_file(small.state_dict(), path)
    else:
        what = small if kind == "whole" else {"model": small.state_dict(), "array": np.arange(3), "epoch": 1}
        if kind == "older":
            what = small.state_dict()
        torch.save(what, path, _use_new_zipfile_serialization=kind != "older")
    content, expected = path.read_bytes(), foreign.read(path).tensors
    shapes = sorted(tuple(tensor.shape) for tensor in expected.values())
    generator = np.random.default_rng(0)
    refused = []
    for _ in range(60):
        flipped = bytearray(content)
        flipped[generator.integers(len(content))] ^= int(generator.integers(1, 256))
        path.write_bytes(flipped)
        try:
            found = foreign.read(path).tensors
        except ValueError as error:
            refused.append(str(error))
        else:
            assert sorted(tuple(tensor.shape) for tensor in found.values()) == shapes
    assert refused
    assert not any("\n" in said for said in refused)


def test_flipped_bytes_of_a_pickle_raise_nothing_else(small):
    """The checksum of a zip file stops these before: here it is the pickle alone."""
    buffer = io.BytesIO()
    torch.save({"model": small, "array": np.arange(3)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        content = file.read("archive/data.pkl")
        sizes = {
            Path(name).name: file.getinfo(name).file_size for name in file.namelist() if "/data/" in name
        }
    generator = np.random.default_rng(0)
    for _ in range(300):
        flipped = bytearray(content)
        for _ in range(2):
            flipped[generator.integers(len(content))] ^= int(generator.integers(1, 256))
        try:
            read = pickles.Pickle(bytes(flipped), sizes)
            foreign.benign.check(read)
            foreign.containers.find(read.value)
        except ValueError:
            pass


def test_no_message_acts_on_a_terminal(tmp_path):
    program = b"\x80\x02cos\x1b[2J\nsystem\n)R."
    assert "\x1b" not in refusal(planted(tmp_path / "x.pt", program))


def test_the_sources_load_no_pickle():
    """There is one call of torch.load, and it is the safe one."""
    text = "\n".join(file.read_text() for file in SOURCES.rglob("*.py"))
    for never in ("weights_only=False", "pickle.load", "torch.jit.load", "torch.hub.", "pretrained=True"):
        assert never not in text
    calls = [line for line in text.splitlines() if re.search(r"torch\.load\((?!weights_only=True\))", line)]
    assert len(calls) == 1
    assert "weights_only=True" in calls[0]


def test_no_job_depends_on_the_reader():
    """Else mending it would run studies anew."""
    users = {
        file.relative_to(SOURCES).parts[0]
        for file in SOURCES.rglob("*.py")
        if "detrojan.foreign" in file.read_text() or "import foreign" in file.read_text()
    }
    assert users <= {"foreign", "commands"}


def test_names_are_equal_as_text_alone():
    assert str(Named("posix", "system")) == "posix.system"
