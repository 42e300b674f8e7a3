"""Weights that are read in parts: what the parts hold, and how many bytes it takes to read them."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.lib.mixins import NDArrayOperatorsMixin

from qjax.checkpoint import pieces, plan
from qjax.checkpoint.opened import open_folder, open_gguf
from qjax.checkpoint.targets import Wanted
from qjax.errors import ShardingError
from qjax.parts import part
from tests.formats.stored import same

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
FOLDERS = {path.parent.name: path.parent for r in (OUTSIDE, GOLDEN) for path in r.glob("*/*.gguf")}
FOLDERS |= {p.parent.name: p.parent for r in (OUTSIDE, GOLDEN) for p in r.glob("*/config.json")}
del FOLDERS["imatrix-qwen3moe"]  # no model


def opened(folder):
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return open_gguf(ggufs[0], True)
    pickled = not any(folder.glob("*.safetensors"))
    source = next(folder.glob("*.bin")) if pickled else folder
    return open_folder(source, None, True, pickled)


def weights_of(found):
    """Of each kind of weight the first."""
    kinds = {
        (place.name.split(".")[-2], place.shape, place.pieces[0].layer.reads): place
        for place in reversed(found.places().values())
        if isinstance(place, plan.Weight)
    }
    return kinds.values()


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_part_is_what_the_whole_has_there(name):
    found = opened(FOLDERS[name])
    with found.files:
        for place in weights_of(found):
            lazy = pieces.decoded(found, place)
            whole = pieces.read(place, lazy)
            assert not any(hasattr(leaf, "read") for leaf in jax.tree.leaves(whole))
            for parts in ((2, 1), (1, 2), (4, 1), (1, 4)):
                for index in range(max(parts)):
                    at = (index, 0) if parts[0] > 1 else (0, index)
                    try:
                        expected = part(whole, parts, at)
                    except ShardingError as error:
                        with pytest.raises(ShardingError, match=str(error).split(":")[0][:40]):
                            pieces.read(place, lazy, Wanted(parts=parts, index=at))
                        break
                    piece = pieces.read(place, lazy, Wanted(parts=parts, index=at))
                    assert same(piece, expected), (place.name, parts, index)
            if len(place.shape) == 3:
                half = pieces.read(place, lazy, Wanted(experts=(2, 1), parts=(2, 1), index=(1, 0)))
                count = len(whole.qvalue) // 2
                second = jax.tree.map(lambda x, count=count: x[count:], whole)
                assert same(half, part(second, (2, 1), (1, 0))), place.name


class Marked(NDArrayOperatorsMixin):
    """A stored array that marks what is taken of it; views of it take nothing.

    Attributes:
      marks: an array of zeros beside it, other than 0 where it was taken.
    """

    def __init__(self, array, marks):
        self.array, self.marks = array, marks

    def taken(self):
        self.marks[...] = np.ones((), self.marks.dtype)
        return self.array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.taken(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, **more):
        arrays = (x.taken() if isinstance(x, Marked) else x for x in inputs)
        return getattr(ufunc, method)(*arrays, **more)

    def __getitem__(self, key):
        found = self.array[key]
        if isinstance(found, np.ndarray) and found.base is not None:
            return Marked(found, self.marks[key])
        self.marks[key] = np.ones((), self.marks.dtype)
        return found

    def __len__(self):
        return len(self.array)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "T":
            return Marked(self.array.T, self.marks.T)
        if name in ("reshape", "view", "swapaxes"):
            return lambda *args: Marked(
                *(getattr(each, name)(*args) for each in (self.array, self.marks))
            )
        if name in ("astype", "any", "all", "tolist"):
            self.taken()
        return getattr(self.array, name)


class MarkedFiles:
    """The tensors of a checkpoint, which tell what is taken of them."""

    def __init__(self, files):
        self.files, self.marks = files, {}

    def is_plain(self, name):
        return self.files.is_plain(name)

    def array(self, name):
        return self._marked(name, self.files.array(name))

    def raw(self, name):
        return self._marked(name, self.files.raw(name))

    def _marked(self, name, array):
        return Marked(array, self.marks.setdefault(name, np.zeros(array.shape, array.dtype)))

    def nbytes(self):
        return sum(np.count_nonzero(m) * m.itemsize for m in self.marks.values())


@pytest.mark.parametrize("name", [n for n in sorted(FOLDERS) if not n.startswith("hqq")])
def test_only_bytes_of_the_part_are_read(name):
    """And small tensors, such as zero points. (Of HQQ, each byte holds weights far apart.)"""
    found = opened(FOLDERS[name])
    with found.files:
        for place in weights_of(found):
            read = [piece.stored[suffix] for piece in place.pieces for suffix in piece.layer.reads]
            sizes = [record.nbytes for record in read]
            small = sum(size for size in sizes if size < max(sizes) / 6)
            if max(sizes) < 8192:
                continue  # all are small
            for parts in ((2, 1), (1, 2)):
                files = MarkedFiles(found.files)
                lazy = pieces.decoded(replace(found, files=files), place)
                try:
                    part_ = pieces.read(place, lazy, Wanted(parts=parts))
                except ShardingError:
                    continue
                # Columns that are sorted as they are read may come from all over a row.
                if "perm" not in part_.aux or parts[1] == 1:
                    assert 0.1 * sum(sizes) < files.nbytes() <= sum(sizes) / 2 + small, place.name
