"""How does a program become native code, and how is that run without compiling anything?

A package is what `torch.save` writes of the program's tensors, with two more entries in the same archive: AOTInductor's package of
the code, and the manifest.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from compile_attn.exported import Served, rewriting_of, steps_begin, tensors_of
from compile_attn.manifest import FILE, Manifest, dtype_name, existing

_CODE = "code.pt2"


class Package(Served):
    """What `load_package` reads: PagedLM serves it as it does a model. Called with the inputs of `export` by name, it gives logits
    [1, R, vocabulary] and writes to the pages; it computes no gradients."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], run: Callable[..., Any]) -> None:
        super().__init__(manifest, tensors, lambda layers, inner: (run, manifest.assumed))
        self._run = run

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
        logits_rows: torch.Tensor,
        k_pages: Sequence[torch.Tensor],
        v_pages: Sequence[torch.Tensor],
        k_scales: Sequence[torch.Tensor] = (),
        v_scales: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        step = input_ids, position_ids, block_table, seq_lens, query_lens, logits_rows
        given = [*([tensor] for tensor in step), k_pages, v_pages, k_scales, v_scales]
        self._check(given)
        wide = map(_at_least_two, step)  # the code is for all sizes from two up; a cache pads likewise
        with torch.no_grad():
            logits: torch.Tensor = self._run(*self.own, *wide, *k_pages, *v_pages, *k_scales, *v_scales)
        return logits[:, : len(logits_rows)]

    def _check(self, given: Sequence[Sequence[torch.Tensor]]) -> None:
        """Native code does not ask what it is given: tensors of other shapes would be other memory."""
        told = self.manifest
        sizes: dict[str, int] = {}
        for (name, wanted), tensors in zip(told.inputs().items(), given, strict=True):
            if len(tensors) != len(wanted):
                raise ValueError(f"{name}: {len(tensors)} tensors; this package takes {len(wanted)}")
            for (dtype, shape), tensor in zip(wanted, tensors, strict=True):
                found = tensor.dtype, tensor.device.type, tensor.is_contiguous(), list(tensor.shape)
                pairs = zip(shape, tensor.shape, strict=False)
                here = [sizes.setdefault(size, length) if isinstance(size, str) else size for size, length in pairs]
                if found != (dtype, told.device, True, here) or len(shape) != len(here):
                    known = ", ".join(f"{size} is {length}" for size, length in sizes.items())
                    raise ValueError(
                        f"{name}: {dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}; this package takes "
                        f"{dtype_name(dtype)} [{', '.join(map(str, shape))}], contiguous, on {told.device}; {known}"
                    )
        for name, size in sizes.items():
            if size > told.assumed.get(name, size):
                raise ValueError(f"{name} is {size}; this package takes at most {told.assumed[name]}")


def _at_least_two(tensor: torch.Tensor) -> torch.Tensor:
    """A step's tensor with zeros behind what it holds, where that is one: of nobody's token, sequence and page."""
    missing = [max(0, 2 - size) for size in tensor.shape]
    if tensor.dtype == torch.int64 and tensor.dim() == 2:
        missing[0] = 0  # ids and positions are [1, T]
    return F.pad(tensor, [pad for more in reversed(missing) for pad in (0, more)]) if any(missing) else tensor


def package(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Compile a program of `export` with AOTInductor, for its device and this machine, and write it with its tensors to one file.

    A file that is there already is replaced when all is done.
    """
    manifest, tensors = Manifest.attached(program), tensors_of(program)
    file, device = Path(path), torch.device(manifest.device)
    rewriting = rewriting_of(program, manifest.layers_on(device))
    assert rewriting.inputs is not None
    from compile_attn.inductor import ahead_of_time, needs_of_native_code

    with tempfile.TemporaryDirectory() as folder:
        code = os.path.join(folder, _CODE)
        rewriting.verify()  # AOTInductor goes by the values in a graph's meta, which are then those of our inputs
        with torch.no_grad():
            ahead_of_time(rewriting.module, rewriting.inputs.values, code)
        if odd := sorted({size for _, _, size in rewriting.excepted()}):
            raise ValueError(
                f"this program cannot be packaged: AOTInductor's code may be wrong for steps of which a size is "
                f"{', '.join(map(str, odd))}; save it, and have PagedLM compile it"
            )
        assumed = rewriting.assumed(steps_begin(len(tensors)))
        told = replace(manifest, native=needs_of_native_code(device), assumed=assumed)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            torch.save(tensors, unfinished)
            with zipfile.ZipFile(unfinished, "a") as archive:
                folder_s = archive.namelist()[0].split("/")[0]  # torch.load wants one for all
                archive.write(code, f"{folder_s}/{_CODE}")
                archive.writestr(f"{folder_s}/{FILE}", told.text())
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def load_package(path: str | Path, device: torch.device | str | None = None) -> Package:
    """Read what `package` has written. ValueError for a file that is damaged or cannot be run here; nothing of it is used then.

    device   the GPU, where there are several; default: the current one

    The file holds native code, which is run: load packages of those whom you trust. Its tensors are read as torch.load does with
    weights_only=True.
    """
    import compile_attn.kernels.ops  # noqa: F401  the ops that the code calls
    from compile_attn.inductor import native_code

    file = existing(path)
    manifest = Manifest.read(file, native=True)
    place = torch.device(manifest.device if device is None else device)
    if place.type != manifest.device:
        raise ValueError(f"{file}: device={str(device)!r}, and its code is for {manifest.device}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(file) as archive:
                [entry] = (name for name in archive.namelist() if name.endswith(f"/{_CODE}"))
                code = archive.extract(entry, folder)
            tensors = torch.load(file, map_location=place, mmap=True, weights_only=True)
            run = native_code(code, place)
        except Exception as error:  # whatever torch raises of a file that is well packed, and is not what it says
            raise ValueError(f"{file}: torch cannot read it: {str(error).strip().splitlines()[0] or error!r}") from error
    return Package(manifest, tensors, run)
