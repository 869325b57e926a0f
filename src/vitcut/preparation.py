"""Commands about data alone: decode it into the cache, propose a label file, make one by eye."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from vitcut.errors import ConfigError
from vitcut.images.settings import DataSettings
from vitcut.inputs import load_model, require
from vitcut.labels import Labels
from vitcut.preprocessing import Framing
from vitcut.progress import say
from vitcut.settings import require_bounds
from vitcut.store import write_text
from vitcut.task import Task, all_classes_task
from vitcut.wordnet import imagenet_labels

if TYPE_CHECKING:
    from vitcut.images.prepare import PreparedData
    from vitcut.model.model import Model


def prepare(
    source: str | Path | None = None,
    *,
    image_size: int = 64,
    skip_bad_images: bool = False,
    orientation: Literal["auto", "apply", "ignore"] = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
) -> "PreparedData":
    """Decode the images of a source into the cache.

    Args:
        source: A Tiny ImageNet .zip or folder, a folder or .zip of class folders, a .parquet file,
            a Hugging Face dataset id, or "drawn"; by default Tiny ImageNet, which is downloaded.
        image_size: Height and width of the decoded images, in pixels.
        skip_bad_images: Leave out images that cannot be decoded, instead of stopping.
        orientation: Whether to turn pictures as their EXIF entry says: apply, or ignore, which auto
            stands for here.
        image_column: The column of a parquet file that holds the pictures; by default "image", or
            the only one.
        label_column: The column of a parquet file that holds the classes; by default label, labels,
            fine_label or class, or the only one.

    Raises:
        DataError: The source cannot be used.
    """
    from vitcut.images.prepare import prepare as prepare_images

    settings = DataSettings(
        source=None if source is None else str(source),
        image_size=image_size,
        skip_bad_images=skip_bad_images,
        orientation=orientation,
        image_column=image_column,
        label_column=label_column,
    )
    return prepare_images(
        settings, Framing(orientation="ignore" if orientation == "auto" else orientation)
    )


def suggest(
    source: str | Path | None = None,
    *,
    model: "str | Path | Model | None" = None,
    arch: str | None = None,
    labels: str | Path | None = None,
    groups: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    out: str | Path = Path("labels.yaml"),
) -> Task:
    """Write a label file that groups ImageNet's classes by WordNet, without decoding images.

    Args:
        source: Images whose classes have WordNet ids, or names of their ancestors, such as "dog";
            takes what prepare takes.
        model: The model whose classes are grouped, without those that it lacks; takes what cut
            takes. By default ImageNet-1k's classes.
        arch: Architecture of a weights file given as model; as for cut.
        labels: A text file with the names of the model's classes; as for cut.
        groups: How many groups to make; 6 by default. If classes have names of ancestors, each is a
            group.
        image_column: The column of a parquet file that holds the pictures; as for prepare.
        label_column: The column of a parquet file that holds the classes; as for prepare.
        out: The label file to write.

    Raises:
        TaskError: Fewer than two classes of the source are ImageNet-1k's.
        ConfigError: ``out`` exists already, or that many groups are impossible.
    """
    from vitcut.groupings import is_coarser, propose
    from vitcut.groupings import suggest as suggest_task
    from vitcut.images.drawn import SOURCE_WORD
    from vitcut.images.sources import open_source

    path = Path(out)
    if path.exists():
        raise ConfigError(f"{path} is there already: choose another --out, or move it away")
    if source == SOURCE_WORD:
        raise ConfigError(f"{SOURCE_WORD} pictures have a label file: give --task {SOURCE_WORD}")
    columns = {"image_column": image_column, "label_column": label_column}
    with open_source(None if source is None else str(source), **columns) as opened:
        ids = tuple(sorted(opened.class_names))
    data = Labels(
        owner="the data",
        ids=ids,
        names=ids,
        stated=opened.class_order,
        stated_by=opened.ordered_by,
    )
    classes, known = imagenet_labels(), ids
    if model is None and (arch or labels):
        raise ConfigError("arch and labels are of a model: give one, or leave them out")
    if model is not None:
        from vitcut.model.classes import find_labels

        loaded = _loaded(model, arch, labels)
        count, every = loaded.weights.num_classes, all_classes_task(data)
        classes, _ = find_labels(loaded.labels, loaded.name, count, data, every)
        known = tuple(own for own in ids if classes.called(own))
    head = ["Groups suggested by WordNet 3.0 ancestors: look through them, and edit."]
    if is_coarser([*ids]):
        if groups is not None:
            raise ConfigError(f"each of the data's {len(ids)} classes is a group: leave out groups")
        written, lines = propose([*ids], classes, path.stem)
        task = written.among(classes).for_data(data)
        head += lines
    else:
        written = suggest_task([*known], 6 if groups is None else groups, path.stem)
        others = dict.fromkeys((own for own in ids if own not in known), "none of the model's")
        written = task = replace(written, excluded={**written.excluded, **others})
    text = yaml.safe_dump(written.to_dict(), sort_keys=False, allow_unicode=True)
    write_text(path, "".join(f"# {line}\n" for line in head) + text)
    return task


def _loaded(model: "str | Path | Model", arch: str | None, labels: str | Path | None) -> "Model":
    from vitcut.model.model import Model

    if isinstance(model, (str, Path)):
        return load_model(model, arch=arch, labels=labels)
    if arch is None and labels is None:
        return require(model, Model)
    raise ConfigError("a loaded model is taken as it is: leave out arch and labels")


def label(
    source: str | Path | None = None,
    *,
    task: str | Path = Path("labels.yaml"),
    serve: bool = False,
    port: int = 0,
    pictures: int = 12,
    no_pictures: bool = False,
    model: "str | Path | Model | None" = None,
    arch: str | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    out: str | Path | None = None,
) -> Path:
    """Name and group the classes of images by eye, on a page in the browser.

    Args:
        source: The images; takes what prepare takes.
        task: The label file (.yaml) to start from, and to write; it need not be there.
        serve: Serve the page to this machine, with all pictures, and save the label file at each
            change, until Ctrl-C. Otherwise the page is a file, which imports and exports it.
        port: Where to serve it; 0 finds a free one.
        pictures: How many pictures of each class are shown at first; a file holds no more.
        no_pictures: Show none.
        model: A model by whose answers odd pictures of a class come first; takes what cut takes.
        arch: Architecture of a weights file given as model; as for cut.
        labels: A text file with the names of the model's classes; as for cut.
        image_column: The column of a parquet file that holds the pictures; as for prepare.
        label_column: The column of a parquet file that holds the classes; as for prepare.
        out: The page to write, if it is not served; by default label.html.

    Returns:
        The page, or the label file where the page was served.

    Raises:
        ConfigError: The page is to be both served and written, or the port is taken.
        TaskError: The label file is malformed, or names classes that the source lacks.
    """
    path = Path(task).expanduser().resolve()
    if path.suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"task must be a .yaml file to write, got {task}")
    if serve and out is not None:
        raise ConfigError(f"a page that is served is not written: leave out {out}, or serve")
    if out is not None and Path(out).suffix not in {".html", ".htm"}:
        raise ConfigError(f"out must be a .html file to write, got {out}")
    if port and not serve:
        raise ConfigError(f"port is for a page that is served, got {port}: give --serve")
    require_bounds("port", port)
    require_bounds("pictures", pictures)
    if model is None and (arch or labels):
        raise ConfigError("arch and labels are of a model: give one, or leave them out")
    from vitcut.labelling.gallery import odd_first, open_gallery
    from vitcut.labelling.page import page_of, read_label_file
    from vitcut.labelling.server import LabelServer

    where = None if source is None else str(source)
    columns = {"image_column": image_column, "label_column": label_column}
    with open_gallery(where, **columns) as opened:
        gallery = opened
        text = read_label_file(path, gallery.labels)
        if no_pictures:
            gallery = replace(gallery, shown=((),) * len(gallery.shown))
        elif model is not None:
            gallery = odd_first(gallery, _loaded(model, arch, labels), first=pictures)
        name = "tiny-imagenet-200" if where is None else Path(where).stem
        page = page_of(
            gallery,
            text,
            task=path,
            source=name,
            pictures=0 if no_pictures else pictures,
            served=serve,
        )
        if not serve:
            written = Path("label.html" if out is None else out)
            write_text(written, page)
            return written

        def again() -> str:
            return read_label_file(path, gallery.labels)

        with LabelServer(page, gallery, path, again, port=port) as server:
            with suppress(KeyboardInterrupt):
                say(f"the label page is at {server.address} (Ctrl-C ends; it saves {path.name})")
                server.serve_forever()
            # A change that is being saved is saved to the end.
            with server.saving:
                return path
