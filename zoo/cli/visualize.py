"""`zoo visualize`: pictures and a page of what a model attends to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

KINDS = ("attention", "query", "rollout", "relevance", "distance", "field")


def visualize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run folder or file of one, a zoo or a timm model name; or radial."
        ),
    ],
    image: Annotated[
        str,
        typer.Argument(
            help="An image file, or digits:N for a held-out digit; with radial the frames, rows and columns "
            "of tokens of a video, such as 21x30x52."
        ),
    ],
    what: Annotated[
        str, typer.Option(help=f"{', '.join(KINDS)}, several with commas, or all that the model allows.")
    ] = "all",
    block: Annotated[str | None, typer.Option(help="A block by name or number; the last by default.")] = None,
    query: Annotated[str, typer.Option(help="down,right as fractions of the image, 0 to 1.")] = "0.5,0.5",
    target: Annotated[
        int | None, typer.Option(help="The class for relevance, by number; else the predicted one.")
    ] = None,
    guided: Annotated[
        bool,
        typer.Option("--guided", help="Relevance times Grad-CAM, which points to the place of the class."),
    ] = False,
    html: Annotated[bool, typer.Option("--html", help="Also write one page with sliders.")] = False,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: shapes without a download.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Side of the image in pixels; else the model's own.")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="With radial: NAME=VALUE of radial_block_mask, such as decay_factor=0.2; repeat."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("attention"),
) -> None:
    """Draw what a model attends to: zoo visualize nat_digits digits:3 --html

    Which frames and blocks of a video radial attention keeps: zoo visualize radial 21x30x52
    """
    from zoo.analysis.page import attention_page
    from zoo.errors import ConfigError, ZooError, did_you_mean
    from zoo.weights.files import write_text

    if source == "radial":
        if html or what != "all":
            raise ConfigError("zoo visualize radial draws one picture, so it takes neither --html nor --what")
        _draw_video(image, query, rule or [], output)
        return
    if rule:
        raise ConfigError("--rule belongs to zoo visualize radial FRAMESxROWSxCOLUMNS")
    kinds = list(KINDS) if what == "all" else [kind.strip() for kind in what.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown --what {kind!r}; use {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    model, name, classes, settings = _load(source, random, size)
    x = _prepare(image, settings)
    scene = Scene(model, name, classes, x, _fractions(query), block, target, guided)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in kinds:
        try:
            figure = scene.draw(kind)
        except ZooError as error:
            if what != "all":
                raise
            print(f"{kind}: {error}")
            continue
        written.append(output / f"{kind}.png")
        figure.savefig(written[-1], dpi=110)
    if html:
        page = attention_page(
            x[0],
            scene.blocks,
            query=scene.query,
            start=scene.block.name,
            layers=dict(scene.layers()),
            title=scene.title("attention"),
        )
        written.append(output / "attention.html")
        write_text(written[-1], page)
    print(f"{scene.title('looked at')}: {', '.join(map(str, written)) or 'nothing could be drawn'}")


def _draw_video(geometry: str, query: str, rules: list[str], output: Path) -> None:
    from inspect import signature

    from zoo.analysis.video import draw_video, radial_view
    from zoo.errors import ConfigError, did_you_mean
    from zoo.layers.radial import radial_block_mask

    sides = geometry.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise ConfigError(
            f"a video is FRAMESxROWSxCOLUMNS of tokens, such as 21x30x52 of 81 frames at 480 x 832 in Wan; "
            f"found {geometry!r}"
        )
    known = {n: p for n, p in signature(radial_block_mask).parameters.items() if p.kind is p.KEYWORD_ONLY}
    given: dict[str, Any] = {}
    for text in rules:
        name, _, value = text.partition("=")
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"unknown --rule {name!r}; use {', '.join(known)}{near}")
        given[name] = _value(value)
    grid = tuple(map(int, sides))
    view = radial_view(grid, query=(0.5, *_fractions(query)), **given)
    told = "".join(f", {name}={value}" for name, value in given.items())
    title = f"radial attention{told}: {view.kept:.1%} of all pairs of tokens are kept"
    output.mkdir(parents=True, exist_ok=True)
    file = output / "radial.png"
    draw_video(view, title=title).savefig(file, dpi=110)
    print(f"{title}: {file}")


def _value(text: str) -> Any:
    """A number or a boolean where the text is one."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Scene:
    """One model, one image, and what is drawn of them."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        classes: list[str],
        x: Tensor,
        query: tuple[float, float],
        block: str | None,
        target: int | None,
        guided: bool,
    ) -> None:
        from zoo.analysis.maps import choose_block, predictions
        from zoo.errors import ConfigError

        self.model, self.name, self.x, self.query, self.guided = model, name, x, query, guided
        shares, self.blocks = predictions(model, x)
        self.block = choose_block(self.blocks, block)
        self.one_block = block is not None
        self.says = ""  # a segmenter says nothing of the whole image
        self.classifies = shares.ndim == 2
        if self.classifies:
            self.target = int(shares[0].argmax()) if target is None else target
            if not 0 <= self.target < shares.shape[1]:
                raise ConfigError(f"--target must be 0 to {shares.shape[1] - 1}, found {target}")
            known = self.target < len(classes)
            self.class_name = classes[self.target] if known else f"class {self.target}"
            self.says = f"; says {self.class_name} with {float(shares[0, self.target]):.0%}"

    def title(self, what: str) -> str:
        """One line above a picture."""
        return f"{self.name}, {what}{self.says}"

    def draw(self, kind: str) -> Figure:
        """The figure of one kind. Raises ZooError where the model does not allow it."""
        from zoo import analysis
        from zoo.analysis.tokens import GroupAttention
        from zoo.errors import ConfigError

        image = self.x[0]
        if kind == "attention":
            if isinstance(self.block, GroupAttention):
                return analysis.draw_query(image, [analysis.query_view(self.block, self.query)])
            return analysis.draw_maps(image, self.block, query=self.query)
        if kind == "query":
            chosen = [self.block] if self.one_block else _spread(list(self.blocks.values()), 3)
            views = [analysis.query_view(block, self.query) for block in chosen]
            return analysis.draw_query(image, views, title=f"{self.name}: what one query sees, mean of heads")
        if kind == "distance":
            return analysis.draw_statistics(
                analysis.head_statistics(self.model, self.x), title=f"{self.name}: one point for each head"
            )
        if kind == "field":
            return analysis.draw_field(
                analysis.effective_receptive_field(self.model, self.x),
                title=f"{self.name}: effective receptive field of the last stage's centre",
            )
        if kind == "relevance" and not self.classifies:
            raise ConfigError(f"relevance is for a class of the whole image, which {self.name} does not name")
        relevance = "guided relevance" if self.guided else "relevance"
        label = {"rollout": "share of the output", "relevance": relevance}[kind]
        told = "rollout" if kind == "rollout" else f"{relevance} for {self.class_name}"
        name = f"{self.name}: {told}"
        return analysis.draw_heat(image, self.maps[kind]()[0], title=name, label=label)

    @property
    def maps(self) -> dict[str, Callable[[], Tensor]]:
        """Maps of the whole model, by name."""
        from zoo import analysis

        return {
            "rollout": lambda: analysis.attention_rollout(self.model, self.x),
            "relevance": lambda: analysis.gradient_relevance(
                self.model, self.x, target=self.target, guided=self.guided
            ),
        }

    def layers(self) -> Iterator[tuple[str, Tensor]]:
        """The maps that this model allows."""
        from zoo.errors import ZooError

        for name, function in self.maps.items():
            if name == "relevance" and not self.classifies:
                continue
            try:
                yield name, function()[0]
            except ZooError:
                continue


def _load(source: str, random: bool, size: int | None) -> tuple[nn.Module, str, list[str], Any]:
    """Model, its name, its classes' names, and the settings of its images."""
    import dataclasses

    import timm

    from zoo import create_model, list_models
    from zoo.errors import ConfigError
    from zoo.recipes.data.transforms import InputSettings
    from zoo.recipes.run_folder import load_trained

    makes_images = f"{source} makes images, which zoo generate does; visualize is for classifiers"
    if source in list_models(task="generation"):
        raise ConfigError(makes_images)
    ours, theirs = source in list_models(task="classification"), source.removeprefix("timm/")
    if not ours and timm.is_model(theirs):
        model = _from_timm(theirs, random, size)
        name, classes, settings = theirs, [], InputSettings.of(model)
    elif ours and random:
        model = create_model(source)
        name, classes, settings = source, [], InputSettings.of(model)
    elif random:
        raise ConfigError(f"--random is for the name of a model; {source} has weights of its own to look at")
    else:
        trained = load_trained(source)
        if trained.recipe is not None and trained.recipe.task == "generation":
            raise ConfigError(makes_images)
        model, name, classes, settings = trained.model, trained.name, trained.classes, trained.settings
    if size is not None:
        settings = dataclasses.replace(settings, size=(settings.size[0], size, size))
    return model.eval(), name + (" with random weights" if random else ""), list(classes), settings


def _from_timm(name: str, random: bool, size: int | None) -> nn.Module:
    import timm

    from zoo.errors import ConfigError, ResourceError

    build = functools.partial(timm.create_model, name, pretrained=not random)
    try:
        if size is None:
            return build()
        try:
            return build(img_size=size)
        except TypeError:  # a model that takes any size
            return build()
    except (OSError, RuntimeError) as error:
        if random:
            raise ConfigError(f"timm cannot build {name}: {error}") from None
        reason = " ".join(str(error).split())[:160]
        raise ResourceError(f"the weights of {name} could not be fetched ({reason})") from None


def _prepare(image: str, settings: Any) -> Tensor:
    """The image as the model wants it, [1, C, height, width]."""
    from zoo.errors import DataError
    from zoo.recipes.data.images import read_image
    from zoo.recipes.data.transforms import eval_transform

    kind, _, number = image.partition(":")
    if kind == "digits" and not Path(image).exists():
        from zoo.recipes.data.digits import Digits

        digits = Digits(train=False)
        if not number.isdecimal() or int(number) >= len(digits):
            raise DataError(f"digits:N needs a number from 0 to {len(digits) - 1}, found {image!r}")
        loaded = digits.load(int(number))
    else:
        loaded = read_image(image)
    return eval_transform(settings)(loaded)[None]


def _fractions(text: str) -> tuple[float, float]:
    from zoo.errors import ConfigError

    parts = text.split(",")
    try:
        down, right = (float(part) for part in parts)
    except ValueError:
        raise ConfigError(
            f"--query must be down,right as fractions such as 0.4,0.5, found {text!r}"
        ) from None
    if not (0 <= down <= 1 and 0 <= right <= 1):
        raise ConfigError(f"--query must be two fractions between 0 and 1 (down,right), found {text!r}")
    return down, right


def _spread(items: list, most: int) -> list:
    """At most that many items, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
