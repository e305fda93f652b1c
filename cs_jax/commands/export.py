"""The commands `export` and `import`: tickets in the formats of other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cs_jax.commands.parser import command_parser
from cs_jax.core import files
from cs_jax.core.errors import ConfigError, error_in_file, one_of
from cs_jax.core.masks import density
from cs_jax.experiment.observers.terminal import print_line
from cs_jax.models import MODELS
from cs_jax.tickets.ticket import load_ticket, save_ticket


def export(arguments: Sequence[str], *, prog: str) -> None:
    """export a ticket to PyTorch, ONNX, StableHLO or SciPy; removes channels without effect"""
    from cs_jax.tickets import export as formats  # imports SciPy's sparse arrays, which is slow

    parser = command_parser(prog, export)
    parser.add_argument("file", type=Path, metavar="TICKET", help="ticket.safetensors of a run")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(formats.FORMATS))
    parser.add_argument("--out", type=Path, help="file to write (default: TICKET with the suffix of the format)")
    parser.add_argument("--keep-shapes", action="store_true", help="do not shrink the network")
    parser.add_argument("--fold", action="store_true", help="fold BatchNorm into the preceding layers")
    given = parser.parse_args(arguments)
    if given.to not in formats.FORMATS:
        raise ConfigError(f"--to {given.to}: must be {one_of(given.to, formats.FORMATS)}")
    out = given.out or given.file.with_suffix(formats.FORMATS[given.to].suffix)
    files.check_out(out, source=given.file)
    loaded = load_ticket(given.file)
    with error_in_file(given.file):
        found = formats.export_ticket(loaded, given.to, out, keep_shapes=given.keep_shapes, fold=given.fold)
    share = found.size / found.dense_size
    print_line(
        Console(),
        f"{out}: {found.size:,} bytes, {share:.1%} of the dense weights ({found.dense_size:,} bytes); logits differ "
        f"by {found.difference:.1e} of the largest logit",
    )
    if found.network.normalization is None:
        print_line(Console(), "the ticket has no normalization: the exported network expects normalized images")


def import_state_dict(arguments: Sequence[str], *, prog: str) -> None:
    """convert a PyTorch state dict in a safetensors file to a ticket"""
    from cs_jax.tickets.export import state_dict

    parser = command_parser(prog, import_state_dict)
    parser.add_argument("file", type=Path, metavar="FILE", help="safetensors file with a state dict")
    parser.add_argument("--model", required=True, help=", ".join(MODELS))
    parser.add_argument("--out", required=True, type=Path, help="ticket to write")
    sizes = {"type": int, "nargs": 3, "metavar": ("HEIGHT", "WIDTH", "CHANNELS")}
    parser.add_argument("--image-shape", help="shape of an image (default: from the file)", **sizes)
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        about = f"{what} of pixels of 0 to 255, for each channel (default: from the file)"
        parser.add_argument(f"--{name}", type=float, nargs="+", metavar="NUMBER", help=about)
    given = parser.parse_args(arguments)
    if (given.mean is None) != (given.std is None):
        raise ConfigError("--mean and --std: must be given together; add the missing flag")
    files.check_out(given.out, source=given.file, kind="state dict")
    with error_in_file(given.file):
        tensors, about = state_dict.read(given.file)
        about |= {"image_shape": given.image_shape} if given.image_shape else {}
        about |= {"normalization": {"mean": given.mean, "std": given.std}} if given.mean else {}
        model, variables = state_dict.from_state_dict(tensors, given.model, about["image_shape"] or ())
        metadata = _metadata(given.model, model, about)
        _check_normalization(metadata)
        save_ticket(given.out, **variables, metadata=metadata)
    print_line(Console(), f"{given.out}: {given.model}, density {density(variables['masks']):.2%}")


def _check_normalization(metadata: dict[str, Any]) -> None:
    """Raises a ConfigError unless mean and std have one number, or one for each channel, and std is above 0."""
    channels = metadata["model"]["image_shape"][-1]
    for name, values in metadata.get("normalization", {}).items():
        if len(values) not in (1, channels):
            raise ConfigError(
                f"--{name}: {len(values)} numbers; must be one number, or one for each channel ({channels})"
            )
        if name == "std" and min(values) <= 0:
            raise ConfigError(f"--std {min(values):g}: must be above 0")


def _metadata(name: str, model: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a ticket whose network was read from a state dict."""
    entry = {"name": name, "num_classes": model.num_classes, "image_shape": about["image_shape"]}
    if model.features:
        entry["features"] = dict(model.features)
    known = {} if about["normalization"] is None else {"normalization": about["normalization"]}
    return {"model": entry, "mask_scale": 1.0, **known}
