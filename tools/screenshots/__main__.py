"""Make the screenshots of the documentation: quickstart opened, while it trains and at its end, panel, and an error.

    python -m tools.screenshots docs            # into docs/images and the folder of the help pages
    python -m tools.screenshots views FOLDER    # these scenes in two sizes, both kinds of nodes, dark and light

Each starts a ComfyUI on the CPU in a temporary folder and trains the quickstart, which takes minutes. COMFYUI_PATH is
the folder of ComfyUI, else it is .runtime/ComfyUI. Needs what tests/requirements.txt names, and a Chromium.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from launcher.environment import ROOT
from launcher.host import OWN, given_folder
from tests.support.browser import open_front_end
from tests.support.host_server import running
from tools.screenshots.studio import Studio, View
from tools.workflow_files import WORKFLOWS

DOCS, HELP = ROOT / "docs" / "images", ROOT / "nodes" / "web" / "docs" / "images"
OF_HELP = ("images_and_captions", "steps", "training_runs", "saved", "inspected")  # the other pictures are for docs
VIEWS = [
    View(width, height, newer, dark)
    for (width, height), newer, dark in itertools.product([(1600, 1000), (1366, 768)], [False, True], [True, False])
]
TRAIN, DATASET, PREVIEWS = "ACLoRATrain", "ACLoRADataset", "ACLoRAPreviewOptions"
PANEL = "dialog.aclora-browser"
EXAMPLE, OWN_FOLDER = "fluent-emoji-high-contrast", "my_style"


def docs(studio: Studio, base: Path) -> None:
    """Take the pictures of README, docs and help pages."""
    make_folder(base)
    studio.look(View(1600, 1000, newer=True))
    studio.open("quickstart")
    studio.window("quickstart_opened", 1200)
    own = {"folder": OWN_FOLDER, "resolution": 256, "trigger_word": "inkstyle"}
    before = {name: studio.change(DATASET, name, value) for name, value in own.items()}
    show_panel(studio)
    studio.page.get_by_label("Caption of butterfly.png").fill("a butterfly with spread wings")
    studio.element("images_and_captions", PANEL, 900)
    save = studio.page.get_by_role("button", name="Save all")
    save.click()
    save.wait_for(state="hidden")
    close_panel(studio)
    for name, value in before.items():
        studio.change(DATASET, name, value)
    studio.start()
    studio.wait_for_text(TRAIN, "training images at 1")  # a while after the first previews
    studio.look(View(1600, 1300, newer=True))
    studio.node("training_runs", TRAIN, width=480)
    studio.wait_for_end()
    studio.look(View(1600, 1000, newer=True))
    studio.window("quickstart_trained", 1200)
    save_sheet(studio, base)
    studio.look(View(1600, 1300, newer=True))
    studio.node("training_ended", TRAIN, width=480)
    studio.node("saved", "ACLoRASave", width=400)
    studio.node("inspected", "ACLoRAInspect", width=400)
    show_error(studio)
    studio.node("error", DATASET, width=400)


def views(studio: Studio, _: Path) -> None:
    """Take every scene in every view."""
    for view in VIEWS:
        studio.look(view)
        studio.open("quickstart", view.name)
        studio.window(f"opened-{view.name}")
        show_panel(studio)
        studio.window(f"panel-{view.name}")
        close_panel(studio)
    studio.look(View())  # the pictures of a training are as dark as ComfyUI was at its start
    studio.open("quickstart", "all views")
    studio.start()
    studio.wait_for_text(TRAIN, "training images at")
    in_all(studio, lambda view: studio.window(f"runs-{view.name}"))
    studio.wait_for_end()
    in_all(studio, lambda view: studio.window(f"ended-{view.name}"))
    show_error(studio)
    in_all(studio, lambda view: studio.window(f"error-{view.name}"))


def in_all(studio: Studio, take: Callable[[View], None]) -> None:
    """Take the scene that is open in every view."""
    for view in VIEWS:
        studio.look(view)
        take(view)


def make_folder(base: Path) -> None:
    """Make a folder in ComfyUI's input: the example's images, one with two captions, and one without a caption."""
    folder = base / "input" / OWN_FOLDER
    shutil.copytree(WORKFLOWS / "example_pictures" / EXAMPLE, folder)
    (folder / "camera.txt").write_text("a camera\na camera with a large lens\n", encoding="utf-8")
    (folder / "christmas_tree.txt").unlink()


def save_sheet(studio: Studio, base: Path) -> None:
    """Save the sheet that the training made of its previews."""
    (sheet,) = (base / "output" / "aclora").glob("*/sheet.png")
    studio.image("steps", sheet.read_bytes(), 640)


def show_panel(studio: Studio) -> None:
    studio.press(DATASET, "Images and captions")
    studio.page.wait_for_selector(f"{PANEL} article")
    studio.page.wait_for_timeout(1500)  # its images


def close_panel(studio: Studio) -> None:
    studio.page.keyboard.press("Escape")
    studio.page.locator(PANEL).wait_for(state="detached")


def show_error(studio: Studio) -> None:
    studio.change(DATASET, "more_resolutions", "big")
    studio.start()
    studio.wait_for_text(DATASET, "more_resolutions")


SETS: dict[str, Callable[[Studio, Path], None]] = {"docs": docs, "views": views}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.screenshots", description=__doc__)
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS)
    options = parser.parse_args()
    host = given_folder(ROOT) or OWN
    with (
        tempfile.TemporaryDirectory() as base,
        running(host, Path(base), "screenshots") as server,
        open_front_end(server.server.address) as page,
    ):
        folders = dict.fromkeys(OF_HELP, HELP) if options.folder == DOCS else {}
        SETS[options.set](Studio(page, options.folder, folders), server.base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
