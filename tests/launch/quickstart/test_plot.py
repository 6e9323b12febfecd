"""The loss curves become a picture."""

from PIL import Image

from launch.quickstart.curves import load_curves
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.plot import draw_curves


def test_the_picture_is_a_readable_png(finished_folder: QuickstartFolder) -> None:
    stages = [load_curves(stage, finished_folder.run(stage)) for stage in ("ar", "joint")]
    draw_curves(stages, 4.1, finished_folder.curves)
    with Image.open(finished_folder.curves) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 600
        assert len(set(image.convert("RGB").resize((200, 120)).tobytes())) > 20, "something is drawn"
