"""Makes a nano FLUX: every part of FLUX.1-dev, a thousandth of its size, with random weights.

    python examples/nano/make_nano.py [OUT] [--seed 0]

The folder has diffusers' layout, so whatever reads FLUX.1-dev reads it too: `FluxPipeline.
from_pretrained(OUT)` samples (noise-like) pictures with it. The transformer is
`fluxfast.model.spec.NANO`. Nothing is downloaded: both tokenizers are trained here, on CORPUS.
The same seed and library versions give the same bytes.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARKER = "nano.json"  # names what this script wrote: seed, version and files
VERSION = 2  # raise it when what is written changes

CLIP_MERGES = 600
CLIP_LENGTH = 77
T5_PIECES = 900
T5_LAYERS = CLIP_LAYERS = 2
VAE_CHANNELS = (16, 32, 32, 32)  # three halvings: 8x, as FLUX's 128, 256, 512, 512
VAE_GAIN = 10.0  # without it the latents of photographs deviate by 0.12 (seed 0)

CORPUS = """\
a photograph of a smiling astronaut in an orange space suit
a model of a space shuttle and a flag behind her
a black and white photograph of a man in a dark coat
a man looking through a camera on a tripod, a park behind him
a close-up photograph of a ginger tabby cat with green eyes
a photograph of a cup of espresso on a red saucer with a spoon
a cup of coffee with milk and a small spoon on a wooden table
a black and white photograph of old coins in four rows on a dark background
a photograph of many small bright galaxies in deep black space
a medical photograph of the back of a human eye, an orange disc with red veins
a photograph of a white rocket on its launch pad at dusk, bright lights below
a black and white photograph of a wall of long narrow bricks
short grass and leaves seen from above, gravel and small stones seen from above
a watercolour painting of a wooden house by the sea in the morning
an oil painting of a bowl of fruit on a blue cloth, soft light from the left
a pencil drawing of an old woman with a hat, detailed, cross-hatching
a digital illustration of a city street at night, neon signs, rain, reflections
a photo of two dogs running along the beach, motion blur, golden hour
a portrait of a young man with glasses, studio lighting, grey background
a wide landscape with mountains, a lake, clouds and a winding road
a macro shot of a yellow flower with drops of water, shallow depth of field
an aerial view of a river through a green forest in autumn
a red car parked in front of a brick building, 35 mm film, grain
a child's drawing of a sun, a tree and three people holding hands
the interior of a kitchen, white tiles, copper pans, window, plants
a 3d render of a glass sphere on a checkered floor, high quality
a logo with the letters in bold, flat colours, simple shapes, vector style
a vintage poster of a train in the mountains, muted colours, large text
a bird on a branch in winter, snow, side view, blurred background
a plate of pasta with tomato sauce and basil, top view, restaurant table
a castle on a hill under a stormy sky, fantasy art, dramatic lighting
a sleeping kitten on a knitted blanket, warm light, cosy
a woman in a red dress dancing on a stage, spotlight, black background
a robot made of brass reading a book in a library, steampunk
in the style of, very detailed, sharp focus, best quality, low quality, blurry, watermark
it's the cat's toy and they're all here: one, two, three, 4 5 6 7 8 9 0 (what? yes!)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "model", metavar="OUT")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    args = parser.parse_args()
    if _is_current(args.out, args.seed):
        print(f"{args.out} is there already (seed {args.seed})", file=sys.stderr)
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            make_nano(args.out, args.seed)
        except FileExistsError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"wrote a nano FLUX (seed {args.seed}) to {args.out}", file=sys.stderr)
    print(args.out)


def make_nano(out: Path, seed: int = 0) -> Path:
    """Write a nano FLUX in diffusers' folder layout to `out` (float32, 29 MB) and return `out`.

    Does nothing if `out` holds this seed's model already, replaces a model that this script
    wrote, and leaves the global random state alone. The folder appears whole or not at all.

    Raises FileExistsError if `out` holds anything else.
    """
    out = Path(out)
    if _is_current(out, seed):
        return out
    target = out.resolve()
    _check_replaceable(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write(part, seed)
        _put_in_place(part, target, seed)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


# ---------------------------------------------------------------- the folder


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _read_marker(out: Path) -> dict:
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) and "files" in marker else {}


def _is_current(out: Path, seed: int) -> bool:
    marker = _read_marker(out)
    same = (marker.get("seed"), marker.get("version")) == (seed, VERSION)
    return same and all((out / name).is_file() for name in marker["files"])


def _check_replaceable(target: Path) -> None:
    """Raise FileExistsError unless `target` is absent, empty or wholly this script's."""
    if not target.exists():
        return
    ours = {MARKER, *_read_marker(target).get("files", [])}
    foreign = sorted(set(_files(target)) - ours) if target.is_dir() else ["it is a file"]
    if foreign:
        raise FileExistsError(
            f"not replacing {target}: this script did not write all of it ({foreign[0]})\n"
            "  hint: give another OUT, or move it away"
        )


def _put_in_place(part: Path, target: Path, seed: int) -> None:
    if _is_current(target, seed):  # another process made the same model meanwhile
        return
    if target.exists():
        _check_replaceable(target)
        shutil.rmtree(target)
    try:
        part.rename(target)
    except OSError:
        if not _is_current(target, seed):
            raise


def _write(folder: Path, seed: int) -> None:
    import torch
    from diffusers import FluxPipeline

    from fluxfast.model.spec import NANO

    clip_tokenizer = make_clip_tokenizer(CORPUS)
    (folder / "tokenizer_2").mkdir()
    t5_tokenizer = make_t5_tokenizer(
        folder / "tokenizer_2" / "spiece.model", CORPUS, NANO.text_length
    )
    makers = {
        "transformer": lambda: make_transformer(NANO),
        "vae": make_vae,
        "text_encoder": lambda: make_clip_encoder(clip_tokenizer, CLIP_LAYERS),
        "text_encoder_2": lambda: make_t5_encoder(t5_tokenizer, T5_LAYERS),
    }
    parts = {}
    with torch.random.fork_rng(devices=[]):  # the libraries draw initial weights globally
        for index, (name, make) in enumerate(makers.items()):
            torch.random.default_generator.manual_seed(1000 * seed + index)
            parts[name] = make().eval()
    pipeline = FluxPipeline(
        scheduler=make_scheduler(), tokenizer=clip_tokenizer, tokenizer_2=t5_tokenizer, **parts
    )
    pipeline.save_pretrained(folder)
    # save_pretrained writes tokenizer.json alone; the published FLUX folders have these two as well
    clip_tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    marker = {"seed": seed, "version": VERSION, "files": _files(folder)}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the networks


def make_transformer(spec):
    """diffusers' class in the shape of a FluxSpec."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=spec.in_channels,
        num_layers=spec.depth,
        num_single_layers=spec.depth_single_blocks,
        attention_head_dim=spec.head_dim,
        num_attention_heads=spec.num_heads,
        joint_attention_dim=spec.context_in_dim,
        pooled_projection_dim=spec.vec_in_dim,
        guidance_embeds=spec.guidance_embed,
        axes_dims_rope=spec.axes_dim,
    )


def make_vae():
    """FLUX's autoencoder, narrow. Its encoder's last layer is adjusted, so that shifted and scaled
    latents have a mean near 0, a deviation near 1 and little sampling noise, as trained ones do."""
    import torch
    from diffusers import AutoencoderKL

    from fluxfast.model.spec import NANO

    depth, latent = len(VAE_CHANNELS), NANO.in_channels // 4
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    weight, bias = (
        vae.encoder.conv_out.weight,
        vae.encoder.conv_out.bias,
    )  # rows: mean, log variance
    with torch.no_grad():
        # its inputs, SiLU(GroupNorm), have one mean in all channels: filters that sum to 0 drop it
        weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
        weight[:latent] *= VAE_GAIN
        bias[:latent] = vae.config.shift_factor
        bias[latent:] = -6.0
    return vae


def make_clip_encoder(tokenizer, layers: int):
    """CLIP's text model; its pooled output is the state at the first <|endoftext|>."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from fluxfast.model.spec import NANO

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=NANO.vec_in_dim,
        intermediate_size=4 * NANO.vec_in_dim,
        projection_dim=NANO.vec_in_dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_t5_encoder(tokenizer, layers: int):
    from transformers import T5Config, T5EncoderModel

    from fluxfast.model.spec import NANO

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=NANO.context_in_dim,
        d_kv=NANO.context_in_dim // 6,
        d_ff=2 * NANO.context_in_dim,
        num_heads=6,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def make_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(  # FLUX.1-dev's settings
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


# ---------------------------------------------------------------- the tokenizers


def make_clip_tokenizer(corpus: str):
    """CLIP's byte-level BPE with merges learned from `corpus`. Ids as CLIP has them: 256 bytes, 256
    bytes that end a word, the merges, <|startoftext|>, <|endoftext|> (the highest id)."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    specials = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]

    # words as CLIP itself splits them
    split = CLIPTokenizer(dict(zip(specials, range(2), strict=True)), []).backend_tokenizer
    words = split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(corpus))
    merges = _learn_merges(Counter(word for word, _ in words), CLIP_MERGES)

    pieces += ["".join(pair) for pair in merges] + specials
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocabulary, merges, model_max_length=CLIP_LENGTH)


def _learn_merges(words: Counter, count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): join the most frequent neighbours, `count` times.

    Not `tokenizers`' trainer: that one leaves out byte pieces that the corpus does not hold, and
    CLIP then reads such a byte as <|endoftext|>, where the pooled output is taken.
    """
    words = {(*word[:-1], word[-1] + "</w>"): times for word, times in words.items()}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_join(word, best): times for word, times in words.items()}
    return merges


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        joined.append("".join(word[i : i + step]))
        i += step
    return tuple(joined)


def make_t5_tokenizer(spiece: Path, corpus: str, length: int):
    """T5's sentencepiece unigram model, learned from `corpus`: <pad> 0, </s> 1, <unk> 2.

    Covers ASCII and Latin-1; any other character reads as <unk>, as in T5. No sentinels
    (<extra_id_0> and so on), which only T5's decoder needs. Written to `spiece`.
    """
    import sentencepiece
    from transformers import T5Tokenizer

    latin = "".join(map(chr, [*range(0x21, 0x7F), *range(0xC0, 0x100)]))
    # the trainer only takes pieces that two different words share: give every word a second form
    lines = corpus.splitlines()
    plurals = [" ".join(word + "s" for word in line.split() if word.isalpha()) for line in lines]
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *plurals]),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_PIECES,
        hard_vocab_limit=False,  # at most: the corpus gives about half
        character_coverage=1.0,
        required_chars=latin,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    spiece.write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(spiece.parent, extra_ids=0, model_max_length=length)
    # what would be saved of the loading: differs between processes and says nothing about T5
    tokenizer.extra_special_tokens = []
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


if __name__ == "__main__":
    main()
