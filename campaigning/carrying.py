"""What a campaign needs to go on with on another machine, as files small enough to be carried there."""

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

import torch

from campaigning.jobs import checkpoint_folder, run_folder, start_of
from errors import UserError
from files import make_folder, write_atomically
from training.checkpoint import open_checkpoint, weights_alone

PIECE = 15 * 2**20  # bytes
MANIFEST = "carry.json"
RESULTS, RUNS = "results", "runs"  # the folders inside


def carried_results(parts, args):
    """{name inside: file} of what is in results/ of the plans: runs, their logs and measurements."""
    found = {}
    for plan in {part.plan.name: part.plan for part in parts}.values():
        folder = Path(args.results) / plan.name
        paths = [*folder.glob("*.json"), *folder.glob("*.csv")] if folder.is_dir() else []
        found |= {f"{RESULTS}/{plan.name}/{path.name}": path for path in sorted(paths)}
    return found


def carried_run(folder, *, needed):
    """{name in the folder: file or bytes} of a run: where it is finished, what it has come to, and its weights if they
    are needed or small; else all that it goes on with."""
    if not (folder / "result.json").exists():
        latest = next((name for name in ("last.pt", "last.prev.pt") if (folder / name).exists()), None)
        names = (latest, "best.pt", "log.csv", "split.csv") if latest else ()
        return {name: folder / name for name in names if (folder / name).exists()}
    files = {name: folder / name for name in ("result.json", "log.csv")}
    if (folder / "last.pt").exists():
        buffer = io.BytesIO()
        torch.save(weights_alone(open_checkpoint(folder / "last.pt")), buffer)
        if needed or buffer.tell() <= PIECE:
            files["last.pt"] = buffer.getvalue()
    return files


def carry_out(folder, parts, jobs, args):
    """Write what the open jobs go on with, and the results, to a folder in pieces of at most PIECE bytes.

    carry.json, written last, lists them with their checksums. Weights of finished runs go along without the state of
    their optimiser, where an open job starts from them or a piece holds them. Raises UserError where it cannot be
    written.
    """
    folder = make_folder(folder)
    needed = {run_folder(start, args) for job in jobs if job.seed is not None and (start := start_of(job))}
    needed |= {checkpoint_folder(job, args) for job in jobs if job.seed is None and job.row.checkpoint}
    members = carried_results(parts, args)
    for name in dict.fromkeys(part.plan.name for part in parts):
        for run in sorted(path for path in (Path(args.out_dir) / name).glob("*-seed-*") if path.is_dir()):
            files = carried_run(run, needed=run in needed)
            members |= {f"{RUNS}/{name}/{run.name}/{file}": content for file, content in files.items()}
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for name, content in members.items():
                content = content if isinstance(content, bytes) else content.read_bytes()
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        whole.seek(0)
        pieces = {}
        while piece := whole.read(PIECE):
            name = f"carry-{len(pieces):02}"
            write_atomically(folder / name, lambda file, piece=piece: file.write(piece))
            pieces[name] = hashlib.sha256(piece).hexdigest()
    write_atomically(folder / MANIFEST, lambda file: file.write(json.dumps({"pieces": pieces}, indent=1).encode()))
    print(f"carried out to {folder}: {len(members)} files as {', '.join(pieces)}")


def read_pieces(folder):
    """{name inside: bytes} of what carry_out wrote. Raises UserError where pieces are missing or damaged."""
    try:
        pieces = json.loads((folder / MANIFEST).read_text())["pieces"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--carry-in {folder}: there is no {MANIFEST} that --carry-out wrote") from error
    with tempfile.TemporaryFile() as whole:
        for name, checksum in pieces.items():
            path = folder / name
            if not path.exists():
                raise UserError(f"--carry-in {folder}: {name} is missing, one of {len(pieces)} pieces")
            piece = path.read_bytes()
            if hashlib.sha256(piece).hexdigest() != checksum:
                raise UserError(f"--carry-in {folder}: {name} is damaged")
            whole.write(piece)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as archive:
            return {entry.name: archive.extractfile(entry).read() for entry in archive}


def is_further(carried, folder):
    """Whether a carried run, {name: bytes}, has come further than the one in a folder."""
    if (folder / "result.json").exists() or not (folder / "last.pt").exists():
        return not (folder / "result.json").exists()
    if "result.json" in carried:
        return True
    with tempfile.TemporaryDirectory() as place:
        latest = Path(place, "last.pt")
        latest.write_bytes(carried.get("last.pt") or carried["last.prev.pt"])
        there, here = open_checkpoint(latest), open_checkpoint(folder / "last.pt")
    return (there["epoch"], there["step"]) > (here["epoch"], here["step"])


def carry_in(folder, args):
    """Put what carry_out wrote to its places, but no run that has come further here, and no result that is here.

    Raises UserError for what is missing or damaged, before anything is written.
    """
    members = read_pieces(Path(folder))
    runs, files = {}, {}
    for name, content in members.items():
        room, plan, *rest = name.split("/")
        if room == RUNS:
            runs.setdefault(Path(args.out_dir, plan, rest[0]), {})[rest[1]] = content
        elif not (target := Path(args.results, plan, *rest)).exists():
            files[target] = content
    for run, carried in runs.items():
        if is_further(carried, run):
            files |= {run / name: content for name, content in carried.items()}
    for path, content in files.items():
        make_folder(path.parent)
        write_atomically(path, lambda file, content=content: file.write(content))
    print(f"carried in from {folder}: {len(files)} files of {len(members)}; the others are here")
