"""One HTML page that shows the attention of every block and head from a file, without a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from importlib import resources

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.analysis.capture import BlockAttention
from zoo.analysis.maps import query_token
from zoo.analysis.pictures import displayable
from zoo.analysis.tokens import GroupAttention
from zoo.errors import ConfigError

MOST_NUMBERS = 2_000_000  # 8 MB of weights; the page asks as many queries as fit
MOST_SIDE = 9  # queries along each side of the image, at most


def attention_page(
    image: Tensor,
    blocks: Mapping[str, BlockAttention],
    *,
    query: tuple[float, float] = (0.5, 0.5),
    start: str | None = None,
    layers: Mapping[str, Tensor] | None = None,
    title: str = "attention",
) -> str:
    """Write the page: sliders over blocks, heads and queries, the weights drawn over the image.

    Everything is inside the text: the image, the weights as float32, the script; the page asks the network
    for nothing. Of every block the weights of a square of queries spread over the image, and of `query`, are
    kept: as many as two million numbers allow. `layers` are further maps [Y, X] by name, such as rollout.

    Shapes: `image` is [C, height, width]. Units: `query` is (down, right) as fractions of the image. `start`
    names the block shown first. Raises: ConfigError for no block, or a query outside the image.
    """
    if not blocks:
        raise ConfigError("a page needs the attention of at least one block")
    names = list(blocks)
    side = _side(blocks)
    asked = [((i + 0.5) / side, (j + 0.5) / side) for i in range(side) for j in range(side)]
    height, width = image.shape[-2:]
    data = {
        "title": title,
        "note": f"Click the image to choose the query: up to {side} x {side} places have their weights in "
        "this file. Colours go from 0 to the largest weight shown.",
        "width": width,
        "height": height,
        "picture": _png(image),
        "query": list(query),
        "start": names.index(start) if start is not None else 0,
        "blocks": [_block(block, [query, *asked]) for block in blocks.values()],
        "layers": [_layer(name, values) for name, values in (layers or {}).items()],
    }
    # "<" cannot end the script element this way, and JSON reads it back.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return resources.files("zoo.analysis").joinpath("page.html").read_text("utf-8").replace("/*DATA*/", text)


def page_data(page: str) -> dict:
    """What a page of `attention_page` holds, weights as arrays [queries, heads, rows, columns]."""
    text = page.split('<script type="application/json" id="data">', 1)[1].split("</script>", 1)[0]
    data = json.loads(text)
    for block in data["blocks"] + data["layers"]:
        values = np.frombuffer(base64.b64decode(block["values"]), "<f4")
        block["values"] = values.reshape(-1, block["heads"], block["rows"], block["columns"])
    return data


def _side(blocks: Mapping[str, BlockAttention]) -> int:
    """How many queries along each side of the image keep the page small."""
    each = sum(
        block.heads * (block.tokens if not isinstance(block, GroupAttention) else 0)
        for block in blocks.values()
    )
    return max([n for n in range(1, MOST_SIDE + 1) if (n * n + 1) * each <= MOST_NUMBERS], default=1)


def _block(block: BlockAttention, asked: list[tuple[float, float]]) -> dict[str, object]:
    facts = {"name": block.name, "mechanism": block.mechanism, "heads": block.heads}
    if isinstance(block, GroupAttention):
        weights = block.weights[:1]  # one image
        rows, columns = weights.shape[-2:]
        values = _numbers(weights)
        return facts | {
            "kind": "channels",
            "rows": rows,
            "columns": columns,
            "queries": [],
            "values": values,
        }
    places = list(dict.fromkeys(query_token(block.grid, query) for query in asked))
    numbers = [block.prefix + row * block.grid[1] + column for row, column in places]
    rows = torch.cat([block.rows(number, number + 1)[:1] for number in numbers], dim=2)
    facts |= {
        "kind": "tokens",
        "rows": block.grid[0],
        "columns": block.grid[1],
        "queries": places,
        "values": _numbers(block.on_map(rows[0].transpose(0, 1))),
    }
    if block.points is not None:
        facts["points"] = block.points[0].flatten(0, 1).tolist()
    return facts


def _layer(name: str, values: Tensor) -> dict[str, object]:
    facts = {"name": name, "kind": "tokens", "heads": 1, "queries": []}
    return facts | {"rows": values.shape[0], "columns": values.shape[1], "values": _numbers(values)}


def _numbers(values: Tensor) -> str:
    array = values.detach().float().cpu().numpy().astype("<f4")
    return base64.b64encode(array.tobytes()).decode("ascii")


def _png(image: Tensor) -> str:
    pixels = (displayable(image) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
