"""What does a program say of itself, and may it be run here?

A saved program carries a manifest beside torch.export's own contents: what a server must give it, and what made it. It is read, and
judged, before anything else of the file is.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compile_attn.cache import PagedKVCache
    from compile_attn.kernels.spec import AttentionSpec
    from compile_attn.passes.pipeline import LayerKV, Rewriting
    from compile_attn.passes.report import Report

FORMAT = 1  # of what is read here; another one is refused
FILE = "paged_attn.json"
_SIZES = "num_kv_heads", "head_dim", "head_dim_v"
_KEY = "paged_attn"  # of the graph's meta, where an ExportedProgram keeps it


@dataclass(frozen=True)
class Manifest:
    """format, and versions of the packages that made it; the device and the page layout that it is for; by attention site, what
    its pages hold and what is computed; the longest sequence that its position tables have, and the most new tokens of a step.
    Of a package also what its native code needs, and how large sequences, max_pages, pages and tokens may be, if it sets bounds."""

    device: str
    page_size: int
    kv_dtype: str  # of fp8 pages; "auto": the model's own
    layers: tuple[Mapping[str, Any], ...]  # num_kv_heads, head_dim, head_dim_v, dtype
    sites: tuple[Mapping[str, str], ...]  # module, spec in words and encoded, kernel
    vocabulary: int  # token ids that the model knows
    max_positions: int | None = None
    max_tokens: int | None = None
    merge_linears: bool = False
    format: int = FORMAT
    versions: Mapping[str, str] = field(default_factory=dict)
    native: Mapping[str, str] | None = None
    assumed: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rewriting: Rewriting, vocabulary: int, cache: PagedKVCache, merge_linears: bool = False) -> Manifest:
        """Of a program that was made for a cache."""
        report = rewriting.report
        layers = [
            {**{name: getattr(layer, name) for name in _SIZES}, "dtype": dtype_name(layer.dtype)} for layer in rewriting.layers
        ]
        sites = [
            {"module": site.where.module, "spec": site.spec.words(), "encoded": site.spec.encode(), "kernel": site.kernel}
            for site in report.sites
        ]
        return cls(
            device=cache.device.type,
            page_size=cache.page_size,
            kv_dtype=stored_as(cache),
            layers=tuple(layers),
            sites=tuple(sites),
            vocabulary=vocabulary,
            max_positions=report.max_positions,
            max_tokens=cache.max_tokens,
            merge_linears=merge_linears,
            versions={name: found for name in ("paged_attn", "torch", "triton") if (found := _version(name))},
        )

    @property
    def stored(self) -> torch.dtype | None:
        """The dtype of fp8 pages; None: the model's own."""
        return None if self.kv_dtype == "auto" else getattr(torch, self.kv_dtype)

    def layers_on(self, device: torch.device) -> tuple[LayerKV, ...]:
        """What the pages of each attention site hold."""
        from compile_attn.passes.pipeline import LayerKV

        return tuple(
            LayerKV(**{name: told[name] for name in _SIZES}, dtype=getattr(torch, told["dtype"]), device=device)
            for told in self.layers
        )

    def computed(self) -> list[tuple[str, AttentionSpec]]:
        """By attention site, the kernel and what it computes."""
        from compile_attn.kernels.spec import AttentionSpec

        return [(site["kernel"], AttentionSpec.decode(site["encoded"])) for site in self.sites]

    def report(self, graph: str = "") -> Report:
        """Of the sites, and the rewritten graph where that is given; what it was before a program does not know."""
        from compile_attn.passes.graph import Location
        from compile_attn.passes.report import Report, Rewritten

        places = [Location(module=site["module"]) for site in self.sites]
        sites = [Rewritten(place, spec, kernel) for place, (kernel, spec) in zip(places, self.computed(), strict=True)]
        return Report("paged", tuple(sites), after=graph, max_positions=self.max_positions)

    def inputs(self) -> dict[str, list[tuple[torch.dtype, tuple[int | str, ...]]]]:
        """By name, in order, the dtype and shape of each tensor that a program takes for a step; sizes of one name are equal."""
        tokens, sequence = (torch.int64, (1, "tokens")), (torch.int32, ("sequences",))
        step = {
            "input_ids": [tokens],
            "position_ids": [tokens],
            "block_table": [(torch.int32, ("sequences", "max_pages"))],
            "seq_lens": [sequence],
            "query_lens": [sequence],
            "logits_rows": [(torch.int64, ("rows",))],
        }
        dtypes = [self.stored or getattr(torch, layer["dtype"]) for layer in self.layers]
        pools = {
            name: [
                (dtype, ("pages", self.page_size, layer["num_kv_heads"], layer[dim]))
                for dtype, layer in zip(dtypes, self.layers, strict=True)
            ]
            for name, dim in (("k_pages", "head_dim"), ("v_pages", "head_dim_v"))
        }
        scales = [] if self.stored is None else [(torch.float32, ())] * len(self.layers)
        return {**step, **pools, "k_scales": scales, "v_scales": scales}  # type: ignore[dict-item]

    def attach(self, program: torch.export.ExportedProgram) -> None:
        program.graph_module.meta[_KEY] = self

    @classmethod
    def attached(cls, program: torch.export.ExportedProgram) -> Manifest:
        """ValueError where the program is not one of `export`."""
        found = program.graph_module.meta.get(_KEY) if isinstance(program, torch.export.ExportedProgram) else None
        if not isinstance(found, cls):
            raise ValueError(
                f"{type(program).__name__}: not a program of compile_attn.export or compile_attn.load; "
                "passes of your own must hand its graph's meta on"
            )
        return found

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path, native: bool | None = False) -> Manifest:
        """Of what `save` has written, `package` (native), or either of them (None).

        ValueError, naming the file, for whatever cannot be run here.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"/{FILE}") or name == FILE]
                if min((entry.header_offset for entry in archive.infolist()), default=1) > 0:  # a list of a part of the file
                    raise zipfile.BadZipFile("its list of contents is missing")
                if not names:
                    by, torch_s = ("package", "torch._inductor.aoti_load_package") if native else ("save", "torch.export.load")
                    raise ValueError(f"{path}: not written by compile_attn.{by}, which puts {FILE} into it; see {torch_s}")
                broken = archive.testzip()
                text = archive.read(names[0])
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: damaged, or no saved program ({error}); save it again") from None
        if broken is not None:
            raise ValueError(f"{path}: damaged: {broken} does not have the checksum that it was saved with; save it again")
        try:
            raw = json.loads(text)
            made = int(raw["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its {FILE} cannot be read ({error!r}); save it again") from None
        if made != FORMAT:
            by = raw.get("versions", {}).get("paged_attn", "another version")
            raise ValueError(
                f"{path}: has format {made}, by paged_attn {by}; this one reads format {FORMAT}: export the model again, "
                f"or install the paged_attn that made it"
            )
        try:
            found = cls(**{**raw, "layers": tuple(raw["layers"]), "sites": tuple(raw["sites"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: its {FILE} cannot be read ({error!r}); save it again") from None
        if native is not None and (found.native is not None) != native:
            by, reader = ("save", "load") if native else ("package", "load_package")
            raise ValueError(f"{path}: written by compile_attn.{by}; read it with compile_attn.{reader}")
        found.check(str(path))
        return found

    def check(self, path: str) -> None:
        """May it run here? ValueError with the cure."""
        from compile_attn.kernels.select import known_kernels
        from compile_attn.kernels.speeds import parts_of

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{path}: made for a CUDA device, and there is none; export the model on the CPU to run it there")
        needed = {part for site in self.sites for part in parts_of(site["kernel"])}
        missing = sorted(needed - set(known_kernels()))
        if missing:
            here = ", ".join(known_kernels())
            raise ValueError(f"{path}: uses {', '.join(missing)}, which this paged_attn does not have; it has {here}")
        if self.native is not None:
            from compile_attn.inductor import cannot_run

            if (why := cannot_run(self.native)) is not None:
                raise ValueError(f"{path}: {why}; package the model's program again, here")
        elif _release(self.versions.get("torch", "0")) > _release(torch.__version__):
            raise ValueError(
                f"{path}: saved by torch {self.versions['torch']}, and this is {torch.__version__}, which need not read it; "
                "install that torch or a later one, or export the model again with this one"
            )
        self._check_kernels(path)

    def _check_kernels(self, path: str) -> None:
        """Can each site's kernel serve it here? Its library may be missing, or the GPU be another."""
        from compile_attn.kernels.select import UnsupportedError, choose

        device = torch.device(self.device)
        try:
            stored = self.stored
            sites = set(zip(self.computed(), (layer.dtype for layer in self.layers_on(device)), strict=True))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: what its {FILE} says of its sites cannot be read ({error!r}); save it again") from None
        for (kernel, spec), dtype in sites:
            try:
                choose(spec, device, dtype, self.page_size, kernel, stored)
            except UnsupportedError as error:
                raise ValueError(f"{path}: {error}; export the model again, here") from None


def save(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Write a program of `export` in torch.export's own format (.pt2), the manifest inside."""
    torch.export.save(program, path, extra_files={FILE: Manifest.attached(program).text()})


def load(path: str | Path) -> torch.export.ExportedProgram:
    """Read what `save` has written. ValueError for a file that is damaged, or that cannot be run here; nothing of it is used then.

    What is executed of a file is what torch.export.load executes of it, and no more; load files of those whom you trust.
    """
    import compile_attn.kernels.ops  # noqa: F401  the ops that programs call

    file = existing(path)
    manifest = Manifest.read(file)
    try:
        program = torch.export.load(file)
    except Exception as error:  # whatever torch raises of a file that is well packed, and is not what it says
        raise ValueError(f"{file}: torch.export.load cannot read it: {str(error).strip().splitlines()[0] or error!r}") from error
    manifest.attach(program)
    return program


def existing(path: str | Path) -> Path:
    """FileNotFoundError where there is no such file."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    return file


def stored_as(cache: PagedKVCache) -> str:
    """The dtype of fp8 pages; "auto": the model's own."""
    return "auto" if cache.pools.fp8 is None else dtype_name(cache.pools.fp8)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 as float32."""
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13)."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())
