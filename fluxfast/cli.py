"""The command line. torch and the trainer are imported inside the commands: `--help` is fast."""

import errno
import json
import os
import re
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fluxfast.errors import ConfigError, FluxfastError, LostRank
from fluxfast.util.files import expanded
from fluxfast.util.redact import plain
from fluxfast.util.terminal import lasting_output, log_to_terminal, progress_bars

app = typer.Typer(
    name="fluxfast",
    help="Train FLUX.1 LoRAs on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # fills paragraphs; "rich" keeps the docstrings' line breaks
    pretty_exceptions_enable=False,
)

# `parser=expanded`: a shell leaves the ~ of `--lora=~/a` to the program
Target = Annotated[
    Path,
    typer.Argument(
        parser=expanded,
        help="a configuration (.yaml), a folder of images or kohya's data set (.toml)",
    ),
]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="override a setting: train.steps=500"),
]
Model = Annotated[
    str | None, typer.Option(help="diffusers folder, .safetensors or GGUF file, or Hub id")
]
Encoders = Annotated[
    str | None,
    typer.Option(help="folder, file or Hub id with VAE and text encoders, if the model has none"),
]
Strength = Annotated[
    list[float], typer.Option(help="of each LoRA file; one for all or one each; 0 leaves it out")
]
Fitted = Annotated[Path | None, typer.Option(parser=expanded, help="a picture to start from")]
Anew = Annotated[
    Path | None, typer.Option(parser=expanded, help="of --image: what is white is painted anew")
]
Crop = Annotated[
    int | None, typer.Option(help="draw only the mask and so many pixels around it, enlarged")
]
ImageStrength = Annotated[
    float | None,
    typer.Option(
        help="share of the steps that --image gets, default 0.6; at 1024 px 0.4 is 68 % noise"
    ),
]
Threshold = Annotated[
    str | None,
    typer.Option(help="dynamic thresholding of --cfg: `preset`, or {mimic_scale: 3, …}"),
]
Few = Annotated[
    str | None, typer.Option(help="few steps: schnell (4), or turbo (8, with its LoRA)")
]
Grid = Annotated[
    list[str],
    typer.Option(metavar="KEY=A,B,…", help="a sheet over values of a setting; once or twice"),
]
Loras = Annotated[
    list[Path],
    typer.Option(parser=expanded, help="a LoRA file of any format; several are added up"),
]
LoraStrength = Annotated[
    list[float], typer.Option(help="of each --lora; one for all or one each; 0 leaves it out")
]
Layers = Annotated[
    Path | None,
    typer.Option(parser=expanded, help="what `fluxfast check` wrote, if trained with it"),
]
Pixels = Annotated[int, typer.Option(min=16, max=2**14, help="pixels")]
Again = Annotated[
    Path | None, typer.Option("--from", parser=expanded, help="a PNG that is drawn again")
]
Trigger = Annotated[str | None, typer.Option(help="word that stands for what is learned")]
Name = Annotated[
    str | None,
    typer.Option(help="of the run and the LoRA file; default: the folder's or data set's own"),
]


@app.command()
def train(
    target: Target,
    set_: Set = [],  # noqa: B006  (typer copies the default)
    model: Model = None,
    encoders: Encoders = None,
    trigger: Trigger = None,
    name: Name = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="start afresh; an earlier run is kept under another name"),
    ] = False,
) -> None:
    """Train a LoRA; a run of the same name goes on where it stopped.

    Examples: `fluxfast train examples/nano/zorb.yaml --set train.steps=500`, or without a
    configuration: `fluxfast train photos/ --model black-forest-labs/FLUX.1-dev --trigger "ohwx
    dog"`. The sections of a configuration are model, lora, data, train, save, sample, validation
    and memory; docs/config.md lists every setting. The path of the finished LoRA is printed to
    stdout. Several GPUs: `torchrun --nproc-per-node 2 -m fluxfast train …`, train.batch_size being
    that of all together.
    """
    config = configuration(target, set_, model, encoders, trigger, name)
    from fluxfast.train import train as run

    with interruptible():
        path = run(config, restart=restart)
    if rank() == 0:
        print(path)


@app.command()
def cache(
    target: Target,
    set_: Set = [],  # noqa: B006
    model: Model = None,
    encoders: Encoders = None,
    trigger: Trigger = None,
) -> None:
    """Encode images and captions ahead of training; `train` then needs no encoder.

    Example: `fluxfast cache examples/nano/zorb.yaml`. The cache folder is printed to stdout.
    """
    config = configuration(target, set_, model, encoders, trigger)
    from fluxfast.data.prepare import prepare
    from fluxfast.distributed import init_distributed
    from fluxfast.formats.base.load import resolve_device
    from fluxfast.run.checkpoint import stored_areas

    with interruptible(), init_distributed() as ranks:
        prepare(config, resolve_device(config.device), ranks, areas=stored_areas(config.run_dir))
    if rank() == 0:
        print(config.cache_path)


@app.command()
def check(
    target: Target,
    set_: Set = [],  # noqa: B006
    model: Model = None,
    encoders: Encoders = None,
    trigger: Trigger = None,
    name: Name = None,
    limit: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="relative error that a layer may have; default 0.03 in int8, 0.05 in fp8"
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=256, help="of the data, to measure on")] = 4,
) -> None:
    """Measure what 8-bit products cost each layer, and choose which are rotated or kept in bf16.

    Example: `fluxfast check examples/nano/zorb.yaml --set model.compute=int8`. Prints a table:
    relative errors without 8-bit products, of y and dx in 8 bits, and of both behind a Hadamard
    rotation, the cosine of the LoRA's gradients with the true ones, the choice. The choices go to
    RUN_DIR/check.yaml, which `--set model.layers=` takes.
    """
    config = configuration(target, set_, model, encoders, trigger, name)
    from fluxfast.tools.check import check as run
    from fluxfast.tools.layer_errors import table

    with interruptible():
        print("\n".join(table(run(config, limit, batches))))


@app.command()
def sample(
    context: typer.Context,
    model: Model = None,
    prompt: Annotated[list[str], typer.Option(help="what to draw; may be repeated")] = [],  # noqa: B006
    negative: Annotated[str | None, typer.Option(help="what not to draw; takes --cfg")] = None,
    cfg: Annotated[float | None, typer.Option(help="classifier-free guidance, true CFG")] = None,
    cfg_start: Annotated[float, typer.Option(help="share of the steps where it begins")] = 0.0,
    cfg_end: Annotated[float, typer.Option(help="share of the steps where it ends")] = 1.0,
    threshold: Threshold = None,
    image: Fitted = None,
    strength: ImageStrength = None,
    mask: Anew = None,
    mask_crop: Crop = None,
    lora: Loras = [],  # noqa: B006
    lora_strength: LoraStrength = [1.0],  # noqa: B006
    seed: Annotated[int, typer.Option(min=-1, help="of the first picture; -1 draws one")] = 42,
    walk_seed: Annotated[bool, typer.Option(help="seed + 1 for each further prompt")] = False,
    width: Pixels = 1024,
    height: Pixels = 1024,
    steps: Annotated[int | None, typer.Option(help="of the sampler, default 20")] = None,
    guidance: Annotated[float | None, typer.Option(help="for dev's embedding, 3.5")] = None,
    sampler: Annotated[str, typer.Option(help="euler or heun")] = "euler",
    sigmas: Annotated[str, typer.Option(help="flux, simple or beta")] = "flux",
    preset: Few = None,
    grid: Grid = [],  # noqa: B006
    from_: Again = None,
    out: Annotated[Path, typer.Option(parser=expanded, help="folder for the PNGs")] = Path(
        "samples"
    ),
    encoders: Encoders = None,
    storage: Annotated[str, typer.Option(help="auto, fp32, bf16, nf4, int8 or fp8")] = "auto",
    compute: Annotated[str, typer.Option(help="auto, fp32, bf16, int8 or fp8")] = "auto",
    layers: Layers = None,
) -> None:
    """Draw pictures. The files are printed to stdout; each holds its settings: see --from.

    Example: `fluxfast sample --model examples/nano/pretrained --lora runs/nano/nano.safetensors
    --prompt "a zorb at the centre" --width 64 --height 64`. Two LoRAs: `--lora a.safetensors
    --lora-strength 1 --lora b.safetensors --lora-strength 0.5`. A sheet: `--grid
    strength=0.2,0.4,0.6 --grid cfg=1,3,6`, of the settings of a preview, lora and lora_strength.
    """
    from fluxfast.tools.generate import sample as run

    with interruptible("the next run draws from the start"):
        sources = {name: context.get_parameter_source(name) for name in context.params}
        written = {name for name, each in sources.items() if each and each.name == "COMMANDLINE"}
        print("\n".join(map(str, run(dict(context.params), written))))


@app.command()
def convert(
    source: Annotated[
        list[Path],
        typer.Argument(parser=expanded, help="LoRA files of any format, then the file to write"),
    ],
    to: Annotated[str, typer.Option(help="diffusers, kohya, comfyui, xlabs or bfl")],
    strength: Strength = [1.0],  # noqa: B006
    scale: Annotated[float, typer.Option(help="of the whole")] = 1.0,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16")] = "fp32",
    drop: Annotated[
        bool, typer.Option("--drop", help="leave out what the format cannot hold")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read it back: max |ΔW difference| per layer")
    ] = False,
) -> None:
    """Turn LoRA files of any format into one of another; several are added up, exactly.

    Examples: `fluxfast convert a.safetensors --to kohya b.safetensors --verify`, `fluxfast convert
    a.safetensors b.safetensors --strength 1 --strength 0.5 --to diffusers sum.safetensors`. What
    is read: diffusers, ai-toolkit, kohya, ComfyUI, XLabs, BFL (control too), OneTrainer, peft. The
    new file's path is printed to stdout, after a line per layer with --verify.
    """
    *sources, target = source
    if not sources:
        raise ConfigError("convert takes a file to read and a file to write", hint="SRC … DST")
    with interruptible("nothing was written"):
        from fluxfast.formats.lora.convert import convert as run

        options = {"strengths": strength, "scale": scale, "dtype": dtype, "drop": drop}
        lines = run(sources, to, target, **options, verify=verify)
        print("\n".join([*lines, str(target)]))


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(parser=expanded, help="a .safetensors or GGUF file, or a model's folder"),
    ],
    checksum: Annotated[
        bool, typer.Option("--checksum", help="read what `quantize` wrote whole, and compare")
    ] = False,
) -> None:
    """Say what a file is: format, model, depths, dtypes, keys missing or extra, size.

    Example: `fluxfast inspect examples/nano/pretrained`. Base checkpoints and LoRA files alike;
    only headers are read.
    """
    from fluxfast.formats.inspect import inspect as run

    print("\n".join(map(plain, run(file, checksum))))


@app.command()
def quantize(
    source: Annotated[
        str, typer.Argument(help="a model's folder, .safetensors or GGUF file, or Hub id")
    ],
    destination: Annotated[
        Path, typer.Argument(parser=expanded, help="the .safetensors file to write")
    ],
    storage: Annotated[str, typer.Option(help="nf4, int8 or fp8")] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="nf4 only: quantize the block scales as well")
    ] = False,
) -> None:
    """Quantize a base checkpoint once, so that training starts from it at once.

    Example: `fluxfast quantize examples/nano/pretrained nano-nf4.safetensors`. Any form that
    `train` reads goes in; the file goes into `--model` (its text encoders and VAE come from
    `--encoders`). Its path is printed to stdout.
    """
    from fluxfast.formats.base.quantize import quantize as run
    from fluxfast.run.interrupt import stop_on_signals
    from fluxfast.util.hub import TRANSFORMER, fetch_model

    with interruptible("nothing was written"):
        base = fetch_model(source, TRANSFORMER)
        # interrupted between two tensors: within one, safetensors raises ValueError instead
        with stop_on_signals() as stop, progress_bars() as bars:
            task = bars.add_task("quantizing", total=None)

            def progress(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)
                if stop.is_set():
                    raise KeyboardInterrupt

            summary = run(base, destination, storage, double_quant=double_quant, progress=progress)
    print(summary, file=sys.stderr)
    print(destination)


@app.command()
def plan(
    target: Annotated[
        Path | None,
        typer.Argument(parser=expanded, help="a configuration (.yaml); FLUX.1-dev without one"),
    ] = None,
    set_: Set = [],  # noqa: B006
    vram: Annotated[
        float | None, typer.Option(min=1.0, help="GiB of the card; default: the named card's own")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="4090, 3090, 5090, 4060 Ti, 3060, L40S, A100 or H100; other cards: --vram alone"
        ),
    ] = None,
) -> None:
    """Predict what a run needs and how fast it is on a card, before there is one.

    Examples: `fluxfast plan`, `fluxfast plan --gpu 4090 --set lora.targets=all`, `fluxfast plan
    examples/ai-toolkit/flux_dev_24gb.yaml --vram 24`. Without a card: 12, 16, 24 and 80 GB.
    """
    from fluxfast.config.schema import build_config
    from fluxfast.memory.planner.report import breakdown, table
    from fluxfast.tools.plan import plan_rows

    if target is not None:
        from fluxfast.data.survey import survey
        from fluxfast.run.checkpoint import stored_areas

        config = configuration(target, set_)
        survey(config, stored_areas(config.run_dir))
    else:
        data = {"folder": ".", "resolution": [512, 768, 1024]}
        config = build_config(
            {"model": {"path": "black-forest-labs/FLUX.1-dev"}, "data": data}, set_
        )
    rows = plan_rows(config, vram, gpu)
    print("\n".join([*table(rows), *breakdown(rows)]))


@app.command()
def doctor() -> None:
    """Show what this machine offers: libraries, GPU, precision, memory, disk, Hub access.

    Example: `fluxfast doctor`. Ends with exit code 1 where something that training needs is
    missing.
    """
    from fluxfast.tools.doctor import report

    lines, healthy = report()
    print("\n".join(lines))
    raise typer.Exit(0 if healthy else 1)


def configuration(target: Path, overrides, model=None, encoders=None, trigger=None, name=None):
    """Returns the configuration in a YAML file, or one for a folder of images or kohya's data set,
    with the options applied.
    """
    from fluxfast.config.key_table import check_owner
    from fluxfast.config.kohya import is_kohya
    from fluxfast.config.schema import build_config, load_config

    options = {"model.path": model, "model.encoders": encoders, "trigger": trigger, "name": name}
    overrides = [  # JSON strings are YAML; in ASCII letters such as emoji would be split in two
        *(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in options.items() if v is not None),
        *overrides,
    ]
    if target.is_dir() or is_kohya(target):
        check_owner(target)  # before it is asked for a model
        if not any(item.startswith("model.path=") for item in overrides):
            raise ConfigError(
                f"training on {target} needs a model",
                hint="--model black-forest-labs/FLUX.1-dev, or the path of a model on this disk; "
                "`fluxfast plan` takes --set model.path=…",
            )
        # a folder's name may hold what a run's may not
        name = target.resolve().name if target.is_dir() else target.stem
        name = re.sub(r"[^\w .+-]", "_", name).lstrip(" .+-") or "lora"
        data = {"folder": str(target)} if target.is_dir() else str(target)
        return build_config({"name": name, "data": data, "model": {}}, overrides, str(target))
    if not target.exists():
        raise ConfigError(
            f"{target} does not exist", hint="give a .yaml configuration or a folder of images"
        )
    return load_config(target, overrides)


@contextmanager
def interruptible(outcome: str = "the same command goes on where it stopped"):
    """Ctrl-C and SIGTERM end a command with a line about the outcome; typer prints none."""
    from fluxfast.run.interrupt import Stopped, handle_signals

    try:
        with handle_signals():
            yield
    except Stopped as stop:
        if rank() == 0:
            program = Path(sys.argv[0]).name
            start = ["python", "-m", "fluxfast"] if program == "__main__.py" else [program]
            if processes := os.environ.get("LOCAL_WORLD_SIZE"):
                start = ["torchrun", "--nproc-per-node", processes, "-m", "fluxfast"]
            arguments = [argument for argument in sys.argv[1:] if argument != "--restart"]
            print(f"{stop}; to go on: {shlex.join([*start, *arguments])}", file=sys.stderr)
        raise typer.Exit(0) from None
    except KeyboardInterrupt as stop:
        # torchrun stops the others after it lost one, which is the error to report
        if isinstance(stop.__context__, LostRank):
            raise stop.__context__ from None
        print_error(f"stopped; {outcome}")
        raise typer.Exit(130) from None


def rank() -> int:
    """Returns this process's rank among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def print_error(message: str) -> None:
    """Print one line to stderr, with this process's rank if it is not 0."""
    print(f"rank {rank()}: {message}" if rank() else message, file=sys.stderr)


@contextmanager
def memory_explained():
    """Raises FluxfastError where memory runs out inside, the GPU's or this machine's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from fluxfast.memory.runtime import is_out_of_memory, memory_reason

        cure = (
            "end what else uses the GPU (`nvidia-smi` lists it), or ask for less: smaller "
            "pictures, a lower data.resolution, the model in nf4"
        )
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            cure = "it is this machine's own memory: end other programs, or add swap space"
        elif not is_out_of_memory(error):
            raise
        raise FluxfastError(f"memory is full: {memory_reason(error)}", hint=cure) from None


def main() -> None:
    """Run the command line; a user's errors become one message on stderr and an exit code."""
    with lasting_output() as (out, _):
        try:
            with log_to_terminal(rank=rank()), memory_explained():
                app()
        except FluxfastError as error:
            print_error(f"error: {plain(error.message)}")
            if error.hint:
                print(f"hint: {plain(error.hint)}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:
            reason = f"{error.filename or 'system'}: {error.strerror or error}"
            print_error(f"error: {plain(reason)}")
            sys.exit(1)
        except SystemExit as stop:
            lost = out.settle()
            # a reader that is gone is no error: a pipe, on Windows, a terminal
            if not stop.code and lost and lost.errno not in (errno.EPIPE, errno.EINVAL, errno.EIO):
                print_error(f"error: stdout: {lost.strerror}")
                sys.exit(1)
            raise
