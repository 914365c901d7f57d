"""WebDataset's shards, `.tar` files of images or latents with labels -> records.

Files whose path is the same up to the first dot of the name are a record: `0001.jpg` and `0001.cls`
or `0001.json`; `0001.npy` and `0001.cls`. The shards are read where they lie with the standard
library's tarfile: once through headers and labels, then record by record.
"""

import io
import json
import tarfile

from formats import caches
from scripts.prepare import cache_items, images, labels, latents, manifest
from utils import files, pictures, processes

ARRAYS = tuple(ending.removeprefix(".") for ending in caches.ITEMS)
PICTURES = tuple(ending.removeprefix(".") for ending in pictures.EXTENSIONS)


def run(args):
    """Runs `prepare_dataset webdataset`; returns whether the records are complete."""
    listing = pictures.Listing()
    index, records = open_index(files.local(args.input), args, listing)
    if index.kind == "latents":
        args.vae = args.vae or "auto"
        return latents.bring(args, _cache(index, records), listing)
    print(f"{args.input}: {images.counted(records)} images{listing}", flush=True)
    where = lambda name: index.root / name  # noqa: E731
    classes, items = labels.numbered(records, args, where)
    settings = {"source": "webdataset", "labels": labels.digest(items)}
    args.vae = args.vae or "mse"
    find = lambda name: (where(name), io.BytesIO(index.content(name)))  # noqa: E731
    return images.convert(args, classes, items, find, settings, index.beside)


def open_cache(root, args, listing):
    """Returns the `latents.Cache` of shards of latents."""
    index, records = open_index(root, args, listing)
    if index.kind != "latents":
        raise ValueError(f"{root} holds images; prepare_dataset webdataset encodes them")
    return _cache(index, records)


def _cache(index, records):
    first = next(iter(records.values()))[0][0]
    title, content = "shards of latents", None
    if first.endswith(".latent"):
        title, content = "MaskDiT's or TREAD's cache: .latent in .tar", "either"
    return latents.Cache(
        title, records, index.item, lambda name: index.root / name, {"source": "webdataset"},
        content, name=first, fetch=index.beside,
    )  # fmt: skip


def open_index(root, args, listing):
    """Returns (`Index`, {split: [(name of a record, label)]}) of the shards at `root`.

    args: `splits`, `label_key`, `config_name` and `on_bad_image`, where it has them.
    """
    config = getattr(args, "config_name", None)
    root, names, said = manifest.find(root, (".tar",), listing, config)
    skip = getattr(args, "on_bad_image", "fail") == "skip"
    more = getattr(args, "conditions", {}).values()
    index, records = Index(root, args.label_key, listing, skip, tuple(more)), {}
    for split, of_split in labels.by_split(names, args.splits, said).items():
        bar = processes.progress(of_split, len(of_split), "shards", f"labels ({split})")
        records[split] = [record for name in bar for record in index.scan(name)]
        if not records[split]:
            raise ValueError(f"{root / of_split[0]}: no images or latents in it{listing}")
        manifest.check_versions(root, [(name.split(":")[0], y) for name, y in records[split]])
    return index, records


class Index:
    """Where in the shards below `root` the records lie.

    label_key: of JSON, or the ending of the files of labels; None: a `.cls` file, or where there is
      none "label" of JSON.
    skip: whether to leave out records without an image.
    more: endings of the files of conditions.
    kind: "images" or "latents", as in the first record.
    """

    def __init__(self, root, label_key, listing, skip=False, more=()):
        self.root, self.kind, self._skip, self._more = root, None, skip, more
        self._label_key, self._listing, self._places = label_key, listing, {}

    def scan(self, shard):
        """Returns the records of a shard: [("SHARD:MEMBER", label as `labels.read` gives it)].

        Raises:
          ValueError: damaged, cut, or a record is none; names the shard and the member.
        """
        path, records = self.root / shard, []
        with files.reading(path, "not a .tar, or compressed, damaged or cut"):
            archive = tarfile.open(path, "r:")
        with archive:
            for stem, members in self._groups(path, archive):
                if record := self._record(path, stem, members, archive):
                    member, label = record
                    name = f"{shard}:{member.name}"
                    if name in self._places:  # as `tar -r` leaves it
                        raise ValueError(f"{path}:{member.name} is there twice")
                    if lacks := [ending for ending in self._more if ending not in members]:
                        raise ValueError(f"{path}:{stem} has no .{lacks[0]} (--conditions)")
                    self._places[name] = (shard, member.offset_data, member.size)
                    for ending in self._more:
                        at = members[ending]
                        self._places[name, ending] = (shard, at.offset_data, at.size)
                    records.append((name, label))
        return records

    def _groups(self, path, archive):
        """Returns (path up to the first dot, {ending: member}) of files that follow each other."""
        stem, members = None, {}
        while (member := self._next(path, archive)) is not None:
            folder, slash, name = member.name.rpartition("/")
            first, dot, ending = name.partition(".")
            if not member.isfile():
                continue
            if not first or not dot:
                self._listing.leave_out("without an ending", f"{path}:{member.name}")
                continue
            pictures.check_name(path, member.name)
            if f"{folder}{slash}{first}" != stem:
                if members:
                    yield stem, members
                stem, members = f"{folder}{slash}{first}", {}
            if ending.lower() in members:
                raise ValueError(f"{path}:{member.name} is there twice")
            members[ending.lower()] = member
        if members:
            yield stem, members

    def _next(self, path, archive):
        with files.reading(path, "damaged or cut"):
            member = archive.next()
            archive.members.clear()  # it keeps them all
            if member is None:  # also where a header is damaged: the end is a block of zeros
                archive.fileobj.seek(archive.offset)
                end = archive.fileobj.read(tarfile.BLOCKSIZE)
                if len(end) < tarfile.BLOCKSIZE or any(end):
                    raise ValueError(f"no record and no end at byte {archive.offset}")
        return member

    def _record(self, path, stem, members, archive):
        """Returns (member that holds the image or array, label); None where there is none."""
        there = [end for end in members if end not in self._more]
        endings = [end for end in there if end in ARRAYS or end in PICTURES]
        endings = endings or [e for e in there if e.rpartition(".")[2] in (*ARRAYS, *PICTURES)]
        if len(endings) > 1:
            raise ValueError(f"{path}:{stem} has {' and '.join(endings)}: which one is the record?")
        label, where = self._label(path, members, archive)
        if not endings:
            if label is not None and self._skip:
                self._listing.leave_out("labels without an image", where)
            elif label is not None:
                raise ValueError(f"{where} has a label, and no image or latent beside it")
            for member in members.values():
                self._listing.leave_out("that are no records", f"{path}:{member.name}")
            return None
        member = members[endings[0]]
        if label is None:
            raise ValueError(f"{path}:{member.name} has no label: {where}")
        kind = "images" if endings[0].rpartition(".")[2] in PICTURES else "latents"
        self.kind = self.kind or kind
        if kind != self.kind:
            raise ValueError(f"{path}:{member.name}: of {kind}, others are of {self.kind}")
        return member, label

    def _label(self, path, members, archive):
        """Returns (label or None, where it is or why it is none)."""
        texts = [end for end in members if end.rpartition(".")[2] == "cls"]
        if self._label_key is not None:
            texts = [self._label_key] if self._label_key in members else []
        if len(texts) > 1:
            raise ValueError(f"{path}:{members[texts[0]].name}: --label_key is one of {texts}")
        if texts:
            where = f"{path}:{members[texts[0]].name}"
            with files.reading(where, "not a label"):
                text = archive.extractfile(members[texts[0]]).read().decode()
                return labels.read(where, text), where
        if "json" not in members:
            lacks = f"there is no .{'json' if self._label_key else 'cls and no .json'}"
            hint = "; --label_key=txt takes its .txt for the name of the class"
            return None, lacks + (hint if "txt" in members and not self._label_key else "")
        where, key = f"{path}:{members['json'].name}", self._label_key or "label"
        with files.reading(where, "not JSON"):
            content = json.loads(archive.extractfile(members["json"]).read())
        if not isinstance(content, dict) or key not in content:
            keys = f"the keys {', '.join(content)}" if isinstance(content, dict) else "no keys"
            return None, f"{where} has {keys}; --label_key names the one of the label"
        return labels.read(where, content[key]), where

    def content(self, name):
        """Returns the bytes of a record's member."""
        shard, offset, size = self._places[name]
        with open(self.root / shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def beside(self, name, ending):
        """Returns (place, bytes or JSON) of a condition of a record, see `conditions.Beside`."""
        where, content = f"{self.root / name}, its .{ending}", self.content((name, ending))
        with files.reading(where, "not JSON"):
            return where, json.loads(content) if ending.endswith("json") else content

    def item(self, name):
        """Returns the `latents.Item` of a record."""
        where = self.root / name
        return cache_items.item(caches.parse(name, self.content(name), where), where)
