"""Pickled arrays are read without unpickling; whatever else a pickle holds is refused."""

import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fastgrpo.evaluation.detectors.pickled_array import LARGEST, read_pickled_array
from fastgrpo.evaluation.detectors.q16 import read_prompts
from fastgrpo.system.errors import ConfigError
from support.detectors import Runs, raw_message

ARRAYS = {
    "q16": np.random.default_rng(0).normal(size=(2, 768)).astype(np.float16),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big-endian": np.arange(6, dtype=">f4").reshape(3, 2),
    "vector": np.arange(5.0),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_protocol_are_read(tmp_path, name, protocol):
    file = tmp_path / "array.p"
    file.write_bytes(pickle.dumps(ARRAYS[name], protocol))
    array = read_pickled_array(file)
    assert np.array_equal(array, ARRAYS[name])
    assert array.dtype == ARRAYS[name].dtype.newbyteorder("=")
    assert array.flags.writeable


@pytest.mark.parametrize("protocol", range(4))  # later ones prefix names with their lengths
def test_the_names_of_numpy_before_2_are_known(tmp_path, protocol):
    """As in Q16's own file, which is of protocol 3 and numpy 1."""
    data = pickle.dumps(ARRAYS["q16"], protocol)
    assert b"numpy._core" in data
    (tmp_path / "array.p").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert np.array_equal(read_pickled_array(tmp_path / "array.p"), ARRAYS["q16"])


def hostile_pickles(victim: str) -> dict[str, bytes]:
    """Pickles that make the folder `victim` when they are unpickled."""
    call, code = Runs(os.mkdir, victim), f"__import__('os').mkdir({victim!r})"
    text = struct.pack("<I", len(victim)) + victim.encode()
    array = ARRAYS["vector"]
    files = {f"os.mkdir, protocol {p}": pickle.dumps(call, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
    return files | {
        "os.system": pickle.dumps(Runs(os.system, f"mkdir {victim}")),
        "eval": pickle.dumps(Runs(eval, code), 2),
        "exec": pickle.dumps(Runs(exec, code), 4),
        "getattr": pickle.dumps(Runs(Runs(getattr, Path(victim), "mkdir"))),
        "inside a tuple": pickle.dumps((array, [call])),
        "inside an array": pickle.dumps(np.array([[call]], dtype=object)),
        "in the place of the dtype": pickle.dumps(array, 3).replace(
            b"cnumpy\ndtype\n", b"cos\nmkdir\nX" + text + b"\x85R0cnumpy\ndtype\n"
        ),
        "before the array": b"cos\nmkdir\nX" + text + b"\x85R0" + pickle.dumps(array, 3),
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93X" + text + b"\x85R.",
        "INST": b"(X" + text + b"ios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nX" + text + b"o.",
        "NEWOBJ": b"cbuiltins\nlist\ncbuiltins\nmap\ncos\nmkdir\nX" + text + b"\x85\x86\x81\x85R.",
    }


@pytest.mark.parametrize("name", hostile_pickles("x"))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name):
    victim = tmp_path / "victim"
    file = tmp_path / "prompts.p"
    file.write_bytes(hostile_pickles(str(victim))[name])
    with pytest.raises(ConfigError, match="nothing in it was run") as error:
        read_prompts(file)
    raw_message(error)
    assert not victim.exists()
    # The file is not refused for being broken: it does run where it is unpickled.
    with suppress(Exception):
        pickle.loads(file.read_bytes())
    assert victim.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_message_says_what_would_have_been_called(tmp_path, protocol):
    file = tmp_path / "prompts.p"
    file.write_bytes(pickle.dumps(Runs(os.mkdir, "x"), protocol))
    with pytest.raises(ConfigError, match=rf"it names {os.mkdir.__module__}\.mkdir; nothing in it was run"):
        read_pickled_array(file)


OTHERS = {
    "empty": b"",
    "truncated": pickle.dumps(ARRAYS["q16"], 3)[:-40],
    "noise": bytes(range(256)),
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "nothing on the stack": b"R.",
    "no mark": b"t.",
    "unknown memo": b"h\x07.",
    "a memo larger than memory": b"Nr\xff\xff\xff\x7f.",
    "state of a number": b"K\x01N\x62.",
    "persistent id": b"Pid\n.",
    "extension": b"\x82\x01.",
    "a list": pickle.dumps([1.0, 2.0]),
    "a number": pickle.dumps(3),
    "integers": pickle.dumps(np.arange(4)),
    "a structure": pickle.dumps(np.zeros(2, [("a", "f4")])),
    "objects": pickle.dumps(np.array([None, None])),
    "a scalar of numpy": pickle.dumps(np.float16(1)),
    "a dtype": pickle.dumps(np.dtype("f2")),
    "an array without state": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
    "a call of ndarray": b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
    "an array of another kind": pickle.dumps(ARRAYS["vector"], 3).replace(b"numpy\nndarray", b"numpy\ndtype"),
    "a shape that is too large": pickle.dumps(ARRAYS["vector"], 3).replace(b"K\x05\x85", b"J\xff\xff\xff\x7f\x85"),
    "too large a file": pickle.dumps(np.zeros(LARGEST, np.float16)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_pickles_of_something_else_are_refused(tmp_path, name):
    file = tmp_path / "prompts.p"
    file.write_bytes(OTHERS[name])
    with pytest.raises(ConfigError, match=r"prompts\.p' is not a pickled numpy array of floats") as error:
        read_pickled_array(file)
    raw_message(error)


def test_no_damage_to_a_pickle_gets_past_with_another_error(tmp_path):
    """Each byte of a small pickle changed in turn: read as floats or refused, never anything else."""
    data = pickle.dumps(np.arange(2, dtype=np.float16), 2)
    file = tmp_path / "prompts.p"
    for place in range(len(data)):
        for value in (0, ord("."), ord("("), ord("R"), data[place] ^ 0x20):
            file.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            with suppress(ConfigError):
                assert read_pickled_array(file).dtype.kind == "f"
