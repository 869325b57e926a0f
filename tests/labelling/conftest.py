"""Drawn pictures in folders that are called like classes of ImageNet-1k, and a server for them."""

from threading import Thread

import pytest
from PIL import Image

from vitcut.images.drawn import drawn_images
from vitcut.labelling.gallery import open_gallery
from vitcut.labelling.page import page_of, read_label_file
from vitcut.labelling.server import LabelServer
from vitcut.wordnet import imagenet_names

NUM_CLASSES, PER_CLASS = 200, 4


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """200 classes of four pictures."""
    folder = tmp_path_factory.mktemp("labelling") / "photos"
    per_shape = PER_CLASS * -(-NUM_CLASSES // 12)
    pictures, _ = drawn_images(images_per_class=per_shape, seed=0, image_size=24)
    for number, own in enumerate(list(imagenet_names())[:NUM_CLASSES]):
        (folder / own).mkdir(parents=True)
        start = number % 12 * per_shape + number // 12 * PER_CLASS
        for at in range(PER_CLASS):
            Image.fromarray(pictures[start + at]).save(folder / own / f"{at}.png")
    return folder


@pytest.fixture(scope="session")
def drawn():
    with open_gallery("drawn") as gallery:
        yield gallery


@pytest.fixture
def serve(tmp_path):
    """Serves a label page of pictures and a file, until the test ends."""
    started = []

    def served(gallery, path=None, **more):
        path = path or tmp_path / "new.yaml"

        def read():
            return read_label_file(path, gallery.labels)

        known = {"source": "photos", "pictures": 3, "served": True, **more}
        server = LabelServer(page_of(gallery, read(), task=path, **known), gallery, path, read)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield served
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()
