import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fmoe.plot import plot_loss

SVG = "{http://www.w3.org/2000/svg}"


def drawn(path: Path) -> tuple[ET.Element, list[str]]:
    root = ET.parse(path).getroot()
    return root, [element.text or "" for element in root.iter(f"{SVG}text")]


def test_the_picture_holds_points_axes_and_references(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    records = [{"step": i, "loss": 6.0 - i / 50} for i in range(201)] + [{"step": 201, "loss": float("nan")}]
    plot_loss(records, path, reference={"uniform": 5.545, "bytes < 256 & more": 3.2})
    root, texts = drawn(path)
    assert root.find(f"{SVG}rect").get("fill") == "white"
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 201
    xs, ys = [float(c.get("cx")) for c in circles], [float(c.get("cy")) for c in circles]
    assert xs == sorted(xs)
    assert ys == sorted(ys), "a falling loss falls in the picture"
    curve = [float(number) for number in re.split("[ ,]", root.find(f"{SVG}polyline").get("points"))]
    assert curve[0::2] == xs
    assert curve[1::2] == pytest.approx(ys, abs=0.11), "averages of a straight line are on it"
    assert {"step", "loss (nats per token)", "0", "100", "200", "2", "4", "6"} <= set(texts)
    assert {"uniform, 5.54", "bytes < 256 & more, 3.20"} <= set(texts)
    dashed = [p for p in root.iter(f"{SVG}path") if p.get("stroke-dasharray")]
    assert len(dashed) == 2


def test_a_long_run_stays_a_small_picture(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    plot_loss([{"step": i, "loss": 2.0 + i % 2} for i in range(5500)], path)
    root, _ = drawn(path)
    assert len(list(root.iter(f"{SVG}circle"))) <= 1000
    assert path.stat().st_size < 100_000


def test_one_step_is_a_picture_and_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    plot_loss([{"step": 3, "loss": 2.0}], path)
    assert "2" in drawn(path)[1]
    with pytest.raises(ValueError, match="plot_loss: records: got no finite loss"):
        plot_loss([{"step": 0, "loss": float("inf")}], path)
