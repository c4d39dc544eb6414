"""``friends export``: images with friendly noise in them, for any program that trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from friends.terminal import Bars, Download, guarded, print_plain

if TYPE_CHECKING:
    from friends.noise.baked import Export


def export(
    data: Annotated[str, typer.Argument(help="Data set that the noise was made for, as friends noise takes it.")],
    noise: Annotated[Path, typer.Option("--noise", help="Store of friendly noise, made by friends noise.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; a stopped export goes on.")],
    kind: Annotated[
        str, typer.Option("--format", help="png (an image folder), parquet (Hugging Face) or npz.")
    ] = "png",
    size: Annotated[int | None, typer.Option(help="Side to which images were resized when the noise was made.")] = None,
    download: Download = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would write, and how many bytes.")] = False,
) -> None:
    """Write the images of a data set with their friendly noise in them, without loss.

    Example: `friends export path/to/images --noise noise/ -o noisy/ --format parquet`

    For training without PyTorch. Random noise, the other half of the defense, is to be added at every step of the
    training: README.md in the folder says how. An export that was stopped, at whatever moment, goes on when the same
    command is given again. docs/export.md says more.
    """

    def work() -> None:
        from friends.noise import baked

        with Bars() as bars:
            prepared = baked.prepare(data, noise, out, kind=kind, size=size, download=download, progress=bars)
        _show_plan(prepared)
        if dry_run:
            baked.check_space(prepared)
            print_plain("nothing was written")
            return
        with Bars() as bars:
            baked.bake(prepared, progress=bars)
        print_plain(f"written; random noise is still to be added at every step: {out / baked.README}", soft_wrap=True)

    guarded(work)


def _show_plan(export: Export) -> None:
    """Print what is going to be written."""
    from friends.noise.grey import grey_limit

    all_of_it, left = export.pieces, export.left
    done = f", {len(all_of_it) - len(left):,} of them there already" if len(left) < len(all_of_it) else ""
    lines = [f"{part.name:<6} {len(part.images):,} images, {_change(part.store is not None)}" for part in export.parts]
    lines.append(f"noise  at most {grey_limit(export.store.zeta)}/255, seed {export.store.seed}, {export.store.path}")
    files = "1 file" if len(all_of_it) == 1 else f"{len(all_of_it):,} files"
    lines.append(f"files  {files} ({export.kind}){done}; about {export.bytes(left):,} bytes to write to {export.out}")
    print_plain("\n".join(lines), soft_wrap=True)


def _change(noisy: bool) -> str:
    return "with friendly noise" if noisy else "unchanged"
