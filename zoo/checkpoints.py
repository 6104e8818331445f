"""What one does with weights files beside loading them: convert, verify, fetch, pin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ConfigError, IntegrityError, did_you_mean

if TYPE_CHECKING:
    from zoo.weights.manifest import Weights


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one weights file after looking at every number in it."""

    name: str
    file: Path | None  # None: not on this machine
    sha256: str | None = None
    size: int | None = None
    problem: str | None = None  # None: sound, or not here
    warnings: tuple[str, ...] = ()


def find_weights(name: str) -> Weights:
    """Return the manifest entry of `<model>` or `<model>.<tag>`.

    Raises: ConfigError for a name that no manifest has.
    """
    from zoo.weights.manifest import all_entries

    entries = all_entries()
    for entry in entries:
        if name in (entry.model, f"{entry.model}.{entry.tag}"):
            return entry
    known = [known for entry in entries for known in (entry.model, f"{entry.model}.{entry.tag}")]
    raise ConfigError(f"no published weights are called {name!r}{did_you_mean(name, known)}")


def get_weights(name: str) -> Path:
    """Fetch published weights, verified, and return where the file lies.

    Raises: ConfigError for an unknown name; IntegrityError for a wrong hash; ResourceError when the file
    cannot be had.
    """
    from zoo.weights.loader import read_pretrained

    entry = find_weights(name)
    return Path(read_pretrained(entry.model, entry.tag)[1])


def convert_checkpoint(source: str | Path, model: str, output: str | Path, **arguments: object) -> Path:
    """Write a published or own weights file as safetensors with a model's own keys.

    Every parameter must be found with its shape; the metadata say which model, which source and its sha256.
    `arguments` are the model's, such as num_classes. Raises: ConfigError for a wrong name or an output that
    exists; IntegrityError, naming the first five keys of each kind, where the file does not fit.
    """
    import safetensors.torch

    from zoo import __version__
    from zoo.registry import create_model, load_checkpoint
    from zoo.weights.files import write_atomically
    from zoo.weights.manifest import entries_of

    source, output = Path(source).expanduser(), Path(output).expanduser()
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output} must end in .safetensors")
    if output.exists():
        raise ConfigError(f"{output} exists; name another file, or remove it first")
    made = create_model(model, **arguments)
    if load_checkpoint(made, source):  # a classifier as initialised is nothing to write down
        raise ConfigError(
            f"{source} has a classifier for other classes than the {made.num_classes} of {model}; name their "
            "number by num_classes (--num-classes), or 0 to write none"
        )
    facts = {
        "format": "pt",
        "model": model,
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "license": next((entry.license for entry in entries_of(model) if entry.license), "unknown"),
        "attnzoo": __version__,
    }
    state = {key: value.contiguous() for key, value in made.state_dict().items()}
    data = safetensors.torch.save(state, metadata=facts)
    write_atomically(output, lambda file: file.write(data))
    return output


def verify_weights(name: str | Path, model: str | None = None) -> Verdict:
    """Look at one weights file: its hash, every number in it, and whether it fits its model.

    `name` is `<model>`, `<model>.<tag>`, or a file, which is compared with `model` where that is named.
    Raises: ConfigError for a name that is neither.
    """
    from zoo.registry import family_of
    from zoo.weights.download import cached, expected_hash

    path = Path(name).expanduser()
    wanted = None
    if model is not None:
        family_of(model)  # ConfigError for an unknown one
    if not path.is_file():
        if path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt") or len(path.parts) > 1:
            raise ConfigError(f"no weights file {path}")
        entry = find_weights(str(name))
        path, model = entry.packaged or cached(entry), entry.model
        name, wanted = f"{entry.model}.{entry.tag}", expected_hash(entry)
        if not path.is_file():
            return Verdict(name=name, file=None)
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    facts = {"name": str(name), "file": path, "sha256": actual, "size": len(data)}
    if wanted is not None and actual != wanted:
        problem = f"sha256 {actual[:12]}... found, {wanted[:12]}... expected"
        return Verdict(**facts, problem=problem)
    try:
        return Verdict(**facts, warnings=_look_at_numbers(path, model))
    except IntegrityError as error:
        return Verdict(**facts, problem=str(error))


def _look_at_numbers(path: Path, model: str | None) -> tuple[str, ...]:
    from zoo.registry import create_model, generator, list_models, load_checkpoint
    from zoo.weights.loader import read_state_dict

    state = read_state_dict(path)
    warnings = []
    for key, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        if not value.isfinite().all():
            raise IntegrityError(f"{path}: {key} holds infinite numbers or NaN")
        if value.numel() > 1 and value.ndim > 1 and not value.any():
            warnings.append(f"{key} is all zero")
    if model is not None:
        # The plain module of a generator: one's own weights are verified without diffusers too.
        plain = model in list_models(task="generation")
        load_checkpoint(generator(model)[0] if plain else create_model(model), path)
    return tuple(warnings)


def pin_weights(name: str) -> tuple[str, int]:
    """Return sha256 and size of a fetched file, as a manifest states them.

    Raises: ConfigError where the file is not on this machine.
    """
    verdict = verify_weights(name)
    if verdict.file is None:
        raise ConfigError(f"{verdict.name} is not on this machine; fetch it by `zoo weights get {name}`")
    if verdict.problem:
        raise IntegrityError(f"{verdict.file}: {verdict.problem}")
    return verdict.sha256, verdict.size
