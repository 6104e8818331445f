"""The page of sliders: its numbers are those of the functions, and a browser shows them."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

import zoo
from zoo import analysis
from zoo.analysis.page import attention_page, page_data

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
NODE = shutil.which("node")

# Moves the sliders as a person would, then writes down what the page shows.
DRIVER = """<script>
const results = [];
function move(id, value) {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
}
function note() {
  const { block, head, query } = current();
  results.push({ block: document.getElementById("block-name").value,
                 shown: document.getElementById("largest").textContent,
                 head, query: block.queries[query] || null,
                 heat: Array.from(Page.heat(block, query, head)) });
}
for (let b = 0; b < data.blocks.length; b++) {
  move("block", b);
  for (let h = 0; h <= data.blocks[b].heads; h++) { move("head", h); note(); }
  move("query", data.blocks[b].queries.length - 1); note();
}
const box = document.getElementById("view").getBoundingClientRect();
move("block", 0);
document.getElementById("view").dispatchEvent(new MouseEvent("click",
  { clientX: box.left + .95 * box.width, clientY: box.top + .05 * box.height }));
note();
const painted = document.getElementById("view").getContext("2d").getImageData(0, 0, 480, 480).data;
const colours = new Set();
for (let i = 0; i < painted.length; i += 404) colours.add(painted.slice(i, i + 3).join());
const out = document.createElement("pre");
out.id = "results";
out.textContent = JSON.stringify({ results, colours: colours.size });
document.body.append(out);
</script></body>"""


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = zoo.create_model("dat_digits").eval()
    image = torch.randn(3, 32, 32)
    blocks = analysis.block_attention(model, image[None])
    page = attention_page(
        image, blocks, query=(0.3, 0.6), layers={"rollout": torch.rand(8, 8)}, title="a </script> b"
    )
    return blocks, page


def test_the_page_holds_the_weights_of_the_functions(case):
    blocks, page = case
    data = page_data(page)
    assert [block["name"] for block in data["blocks"]] == list(blocks)
    for held in data["blocks"]:
        block = blocks[held["name"]]
        assert held["values"].shape == (len(held["queries"]), block.heads, *block.grid)
        for (row, column), values in zip(held["queries"], held["values"], strict=True):
            query = ((row + 0.5) / block.grid[0], (column + 0.5) / block.grid[1])
            np.testing.assert_array_equal(values, analysis.attention_map(block, query).numpy())
    assert data["blocks"][0]["queries"][0] == [2, 4]  # the one asked for comes first
    assert data["title"] == "a </script> b"


def test_the_page_asks_nothing_of_the_network(case):
    _, page = case
    assert "default-src 'none'" in page
    assert not any(word in page for word in ("http:", "https:", "src=", "@import", "fetch(", "url("))


def test_the_page_stays_small():
    """Fewer queries of larger maps, never more than about two million numbers."""
    weights = torch.rand(1, 4, 3136, 49)
    keys = torch.randint(3136, (1, 1, 3136, 49))
    blocks = {
        str(i): analysis.TokenAttention(str(i), "neighborhood", weights, (56, 56), keys=keys)
        for i in range(8)
    }
    data = page_data(attention_page(torch.rand(3, 224, 224), blocks))
    assert len(data["blocks"][0]["queries"]) > 1
    assert sum(block["values"].size for block in data["blocks"]) <= 2_000_000


def test_channels_have_a_matrix_and_no_query():
    blocks = {"c": analysis.GroupAttention("c", "channel", torch.rand(1, 3, 5, 5), (8, 8))}
    (held,) = page_data(attention_page(torch.rand(3, 32, 32), blocks))["blocks"]
    assert held["kind"] == "channels" and held["queries"] == [] and held["values"].shape == (1, 3, 5, 5)


def test_no_block_is_refused():
    with pytest.raises(zoo.ConfigError, match="at least one block"):
        attention_page(torch.rand(3, 32, 32), {})


def matches(results: list[dict], blocks) -> None:
    for shown in results:
        block = blocks[shown["block"]]
        row, column = shown["query"]
        query = ((row + 0.5) / block.grid[0], (column + 0.5) / block.grid[1])
        heat = analysis.attention_map(block, query)
        heat = heat.mean(0) if shown["head"] == 0 else heat[shown["head"] - 1]
        np.testing.assert_allclose(np.reshape(shown["heat"], block.grid), heat.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the path (Debian: chromium-headless-shell)")
def test_sliders_in_a_browser_show_what_the_functions_return(case, tmp_path):
    blocks, page = case
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", DRIVER))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    answer = json.loads(dom.split('<pre id="results">', 1)[1].split("</pre>", 1)[0])
    results = answer["results"]
    assert len(results) == sum(block.heads + 2 for block in blocks.values()) + 1
    matches(results, blocks)
    assert results[-1]["query"] == [0, 7]  # where the image was clicked
    assert float(results[0]["shown"]) == pytest.approx(max(results[0]["heat"]), rel=1e-3)
    assert answer["colours"] > 5  # something was painted


@pytest.mark.skipif(NODE is None, reason="needs node on the path")
def test_the_script_reads_the_numbers_of_the_page(case, tmp_path):
    """The same logic without a browser: `Page` of the page's own script, run on the page's own data."""
    blocks, page = case
    script = page.split("<script>", 1)[1].split("const data =", 1)[0]
    data = page.split('id="data">', 1)[1].split("</script>", 1)[0]
    program = f"""{script}
    const results = [];
    for (const block of ({data}).blocks) {{
      block.values = Page.floats(block.values);
      for (let head = 0; head <= block.heads; head++)
        for (let q = 0; q < block.queries.length; q++)
          results.push({{ block: block.name, head, query: block.queries[q],
                          heat: Array.from(Page.heat(block, q, head)) }});
    }}
    console.log(JSON.stringify(results));"""
    (tmp_path / "page.js").write_text(program)
    done = subprocess.run([NODE, str(tmp_path / "page.js")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    matches(json.loads(done.stdout), blocks)
