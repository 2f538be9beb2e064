"""What a campaign needs to go on with on another machine, as files small enough to be carried there."""

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

import torch

from campaigning.jobs import checkpoint_folder, is_trained, run_folder, start_of
from errors import UserError
from files import make_folder, write_atomically
from training.checkpoint import open_checkpoint, weights_alone

PIECE = 15 * 2**20  # bytes
MOST = 4 * PIECE  # of runs; results go along in any case
MANIFEST, RESULTS = "carry.json", "results.tar"


def write_tar(file, members):
    """Write {name inside: file or bytes} as a tar archive."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def read_tar(file):
    with tarfile.open(fileobj=file) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def carry_results(folder, parts, args):
    """Write what is in results/ of the plans, runs, their logs and measurements, to one file in the folder."""
    members = {}
    for name in dict.fromkeys(part.plan.name for part in parts):
        place = Path(args.results) / name
        paths = [path for path in place.glob("*") if path.suffix in (".json", ".csv", ".png")]
        members |= {f"{name}/{path.name}": path for path in sorted(paths)}
    write_atomically(make_folder(folder) / RESULTS, lambda file: write_tar(file, members))


def carried_run(folder):
    """{name in the folder: file or bytes} of a run: where it is finished, its result and its weights; else all that it
    goes on with."""
    if not (folder / "result.json").exists():
        latest = next((name for name in ("last.pt", "last.prev.pt") if (folder / name).exists()), None)
        names = (latest, "best.pt", "log.csv", "split.csv") if latest else ()
        return {name: folder / name for name in names if (folder / name).exists()}
    if not (folder / "last.pt").exists():
        return {}
    buffer = io.BytesIO()
    torch.save(weights_alone(open_checkpoint(folder / "last.pt")), buffer)
    return {"last.pt": buffer.getvalue()} | {name: folder / name for name in ("result.json", "log.csv")}


def size_of(content):
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def runs_to_carry(parts, jobs, args):
    """({name inside: file or bytes}, the folders left behind) of runs, up to MOST bytes of them: first the finished
    ones that open jobs need, then those that were cut, then the other finished ones."""
    needed = {run_folder(start, args) for job in jobs if job.seed is not None and (start := start_of(job))}
    needed |= {checkpoint_folder(job, args) for job in jobs if job.seed is None and job.row.checkpoint}
    names = dict.fromkeys(part.plan.name for part in parts)
    folders = [path for name in names for path in sorted((Path(args.out_dir) / name).glob("*-seed-*"))]
    members, left_behind, room = {}, [], MOST
    for run in sorted(folders, key=lambda run: (run not in needed, is_trained(run))):
        files = carried_run(run)
        size = sum(map(size_of, files.values()))
        if size > room:
            left_behind.append(run)
            continue
        room -= size
        members |= {f"{run.parent.name}/{run.name}/{file}": content for file, content in files.items()}
    return members, left_behind


def carry_out(folder, parts, jobs, args):
    """Write the results, and what the open jobs go on with in pieces of at most PIECE bytes, to a folder.

    carry.json, written last, lists the pieces with their checksums; until then those of before stay. Weights of
    finished runs go along without the state of their optimiser. Raises UserError where it cannot be written.
    """
    carry_results(folder, parts, args)
    folder = Path(folder)
    members, left_behind = runs_to_carry(parts, jobs, args)
    with tempfile.TemporaryFile() as whole:
        write_tar(whole, members)
        whole.seek(0)
        pieces = {}
        while piece := whole.read(PIECE):
            checksum = hashlib.sha256(piece).hexdigest()
            name = f"carry-{len(pieces):02}-{checksum[:12]}"
            write_atomically(folder / name, lambda file, piece=piece: file.write(piece))
            pieces[name] = checksum
    write_atomically(folder / MANIFEST, lambda file: file.write(json.dumps({"pieces": pieces}, indent=1).encode()))
    for old in set(folder.glob("carry-*")) - {folder / name for name in pieces}:
        old.unlink()
    print(f"carried out to {folder}: {RESULTS}, and {len(members)} files of runs as {', '.join(pieces)}")
    for run in left_behind:
        print(f"left behind, there is no room for it: {run}")


def read_pieces(folder):
    """{name inside: bytes} of the runs that carry_out wrote. Raises UserError where pieces are missing or damaged."""
    try:
        pieces = json.loads((folder / MANIFEST).read_text())["pieces"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--carry-in {folder}: there is no {MANIFEST} that --carry-out wrote to its end") from error
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
        return read_tar(whole)


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


def put(files):
    for path, content in files.items():
        make_folder(path.parent)
        write_atomically(path, lambda file, content=content: file.write(content))


def carry_in(folder, args):
    """Put what carry_out wrote to its places, but no run that has come further here, and no result that is here.

    The results come first. Raises UserError for what is missing or damaged of the runs, before any of them is written.
    """
    folder = Path(folder)
    results = {}
    if (folder / RESULTS).exists():
        with open(folder / RESULTS, "rb") as file:
            results = {Path(args.results, name): content for name, content in read_tar(file).items()}
    put({path: content for path, content in results.items() if not path.exists()})
    runs, files = {}, {}
    for name, content in read_pieces(folder).items():
        run, _, file = name.rpartition("/")
        runs.setdefault(Path(args.out_dir, run), {})[file] = content
    for run, carried in runs.items():
        if is_further(carried, run):
            files |= {run / name: content for name, content in carried.items()}
    put(files)
    print(f"carried in from {folder}: {len(results)} results, {len(files)} files of runs")
